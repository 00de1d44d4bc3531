"""When a run writes its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckpointPlan"]


@dataclass(frozen=True)
class CheckpointPlan:
    """When a run writes checkpoints, and how many are kept.

    One is written after the first epoch or change of form, every ``minutes``, and when the run is
    stopped. Others are written after each epoch and change of form, as long as checkpoints take
    less than ``share`` of the time.

    Args:
        minutes: the longest time between two checkpoints; 0: one after each step. None: only when
            the run is stopped.
        keep: how many are kept, 2 or more: if the newest one is damaged, there is another.
        share: the largest share of the time that checkpoints after epochs and changes may take.

    Raises:
        ValueError: a negative time, fewer than 2 kept, or a share that is not in (0, 1].
    """

    minutes: float | None = 10.0
    keep: int = 2
    share: float = 0.01

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes >= 0:
            raise ValueError(f"the minutes between checkpoints are 0 or more, got {self.minutes}")
        if self.keep < 2:
            raise ValueError(f"a run keeps 2 or more checkpoints, got {self.keep}")
        if not 0 < self.share <= 1:
            raise ValueError(f"the share of time for checkpoints lies in (0, 1], got {self.share}")
