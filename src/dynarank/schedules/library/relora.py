"""ReLoRA: an adapter that is repeatedly merged into its weight and restarted."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

from dynarank.forms import Adapted, AdaptedExecution, FullRank, Plan, RankLike
from dynarank.schedules.base import Clock, RankSchedule, Readings, When, step_of
from dynarank.schedules.phases import Phases

__all__ = ["ReLoRA"]


@dataclass(frozen=True)
class ReLoRA(RankSchedule):
    """A full-rank warm start, then adapters that are merged and restarted every ``every``.

    From ``warm_start`` on, ``restart = floor((step - warm_start) / every)``. The other two parts of
    the method are arguments of the rank scheduler: ``RankScheduler(..., moments=schedule.moments,
    callbacks=[LRRewarmup(schedule.rewarmup)])``.

    Args:
        rank: the rank of the adapters.
        warm_start: when the full-rank warm start ends, a share of the run (float) or a step (int);
            0: no warm start.
        every: the time between restarts, a share of the run (float) or a number of steps (int).
        alpha: the adapter's scale is ``alpha / rank``.
        rewarmup: the number of steps of LR re-warm-up after a restart; None: no re-warm-up.
        decomposition: the decomposition's name.
        execution: how the adapted form multiplies, see :class:`dynarank.Adapted`.

    Raises:
        ValueError: a time out of range, ``rewarmup`` below 0, an impossible rank.

    Example:
        >>> schedule = ReLoRA(4, warm_start=5000, every=5000)
        >>> schedule(Clock(15000, 20000), Readings({"a": (8, 8)}))
        {'a': Adapted(rank=4, decomposition='svd', alpha=32.0, restart=2)}

    Evidence: ``docs/evidence.md``, beside fixed low rank of the same FLOPs.

    Reference:
        Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695,
        2023. The defaults are its code's, and those of its 20,000-step runs.
    """

    rank: RankLike = 128
    _: KW_ONLY
    warm_start: When = 0.25
    every: When = 0.25
    alpha: float = 32.0
    rewarmup: int | None = 100
    decomposition: str = "svd"
    execution: AdaptedExecution = "auto"

    moments = "prune"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", self.form.rank)
        if self.warm_start:
            Phases((0, self.warm_start), (FullRank(), self.form))  # validates the warm start
        if not self.every > 0 or (isinstance(self.every, float) and self.every > 1):
            raise ValueError(
                "an adapter lasts at least one step (int) or a share of the run (float in (0, 1]), "
                f"got every={self.every!r}"
            )
        if self.rewarmup is not None and self.rewarmup < 0:
            raise ValueError(f"rewarmup is a number of steps, 0 or more, got {self.rewarmup!r}")

    @cached_property
    def form(self) -> Adapted:
        """The first adapter."""
        return Adapted(self.rank, self.decomposition, self.alpha, self.execution)

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """The form of every layer at this step."""
        since = clock.step - step_of(self.warm_start, clock.total_steps)
        if since < 0:
            return dict.fromkeys(readings.layers, FullRank())
        number = since // max(1, step_of(self.every, clock.total_steps))
        return dict.fromkeys(readings.layers, replace(self.form, restart=number))
