"""The interface for showing the progress of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dynarank.forms import Change
from dynarank.records import EpochRecord

__all__ = ["Listener", "Progress"]


@dataclass(frozen=True)
class Progress:
    """The progress of a run after an optimizer step.

    Args:
        epochs_done: the epochs done, a fraction.
        step: the number of optimizer steps done.
        total_steps: the number of steps of the run.
        phase: the form that all scheduled layers have, or ``"mixed"``.
        share_full_rank: the share of the scheduled layers that are full-rank, by number.
        relative_flops_so_far: the training FLOPs so far relative to as many full-rank steps.
        learning_rate: the learning rate of the next step.
    """

    epochs_done: float
    step: int
    total_steps: int
    phase: str
    share_full_rank: float
    relative_flops_so_far: float
    learning_rate: float


class Listener(Protocol):
    """Receives the events of a run, to show its progress."""

    def step(self, progress: Progress) -> None:
        """Called after each optimizer step."""

    def changed(self, epochs_done: float, changes: list[Change]) -> None:
        """Called after layers have changed form."""

    def epoch(self, record: EpochRecord) -> None:
        """Called at the end of each epoch."""
