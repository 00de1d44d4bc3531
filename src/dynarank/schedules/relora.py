"""ReLoRA: an adaptor that is merged into its weight and begun anew, again and again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dynarank.forms import Adapted, AdaptedExecution, Form, FullRank, Plan, RankLike
from dynarank.schedules.base import Clock, Moment, Readings, step_of
from dynarank.schedules.data import serialisable
from dynarank.schedules.phases import Phases

__all__ = ["Restarts", "relora"]


@serialisable
@dataclass(frozen=True)
class Restarts:
    """One form until ``start``, then adaptors, another one after each ``every``.

    From ``start`` on, ``restart = floor((step - start) / every)``.

    Args:
        first: what every layer is before ``start``.
        start: when the first adaptor begins, a share of the run (float) or a step (int).
        every: how long an adaptor lasts, likewise.
        form: the adaptor, its restart counted from its own number on.
        rewarm: over how many steps the learning rate should come back after a restart: what to
            give to ``RankScheduler(rewarm=...)``, which a schedule cannot do itself.

    Raises:
        ValueError: a moment out of range, or ``rewarm`` below 0.

    Example:
        >>> restarts = Restarts(FullRank(), 2, 3, Adapted(4), rewarm=0)
        >>> forms = [restarts(Clock(t, 9), Readings({"a": (8, 8)}))["a"] for t in (1, 2, 4, 5)]
        >>> [getattr(form, "restart", None) for form in forms]
        [None, 0, 0, 1]
    """

    first: Form
    start: Moment
    every: Moment
    form: Adapted
    rewarm: int = 100

    def __post_init__(self) -> None:
        if self.start:
            Phases((0, self.start), (self.first, self.form))  # says what is wrong with the moment
        if not self.every > 0 or (isinstance(self.every, float) and self.every > 1):
            raise ValueError(
                "an adaptor lasts at least one step (int) or a share of the run (float in (0, 1]), "
                f"got every={self.every!r}"
            )
        if self.rewarm < 0:
            raise ValueError(f"rewarm is a number of steps, 0 or more, got {self.rewarm!r}")

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """The form of every layer at this moment."""
        since = clock.step - step_of(self.start, clock.total_steps)
        if since < 0:
            return dict.fromkeys(readings.layers, self.first)
        number = since // max(1, step_of(self.every, clock.total_steps))
        form = replace(self.form, restart=self.form.restart + number)
        return dict.fromkeys(readings.layers, form)


def relora(
    rank: RankLike = 128,
    *,
    start: Moment = 0.25,
    every: Moment = 0.25,
    alpha: float = 32.0,
    rewarm: int = 100,
    decomposition: str = "svd",
    execution: AdaptedExecution = "auto",
) -> Restarts:
    """Full-rank until ``start``, then adaptors: each is merged after ``every`` and another follows.

    Give its other two parts to the scheduler: ``RankScheduler(..., moments="prune",
    rewarm=schedule.rewarm)``.

    Args:
        rank: of the adaptors.
        start: when the full-rank warm start ends, a share of the run (float) or a step (int);
            0 for none.
        every: how long an adaptor lasts, likewise.
        alpha: the adaptor's scale is ``alpha / rank``.
        rewarm: see :class:`Restarts`.
        decomposition: the decomposition's name.
        execution: how the adapted form multiplies, see :class:`dynarank.Adapted`.

    Raises:
        ValueError: as :class:`Restarts`.

    Example:
        >>> schedule = relora(4, start=5000, every=5000)
        >>> schedule(Clock(15000, 20000), Readings({"a": (8, 8)}))
        {'a': Adapted(rank=4, decomposition='svd', alpha=32.0, restart=2)}

    Reference:
        Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695,
        2023. The defaults are its code's, and those of its 20,000-step runs.
    """
    form = Adapted(rank, decomposition, alpha, execution)
    return Restarts(FullRank(), start, every, form, rewarm)
