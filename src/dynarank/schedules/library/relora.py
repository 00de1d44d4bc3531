"""ReLoRA: an adapter that is merged into its weight and begun anew, again and again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dynarank.forms import Adapted, AdaptedExecution, Form, FullRank, Plan, RankLike
from dynarank.schedules.base import Clock, Readings, When, step_of
from dynarank.schedules.phases import Phases
from dynarank.schedules.serialization import serializable

__all__ = ["Restarts", "relora"]


@serializable
@dataclass(frozen=True)
class Restarts:
    """One form until ``start``, then adapters, another one after each ``every``.

    From ``start`` on, ``restart = floor((step - start) / every)``.

    Args:
        first: what every layer is before ``start``.
        start: when the first adapter begins, a share of the run (float) or a step (int).
        every: how long an adapter lasts, likewise.
        form: the adapter, its restart counted from its own number on.
        rewarm: over how many steps the learning rate should come back after a restart: what to
            give to ``RankScheduler(rewarm=...)``, which a schedule cannot do itself; nor can it
            choose ``moments``, to which it would say ``"prune"``.

    Raises:
        ValueError: a moment out of range, or ``rewarm`` below 0.

    Example:
        >>> restarts = Restarts(FullRank(), 2, 3, Adapted(4), rewarm=0)
        >>> forms = [restarts(Clock(t, 9), Readings({"a": (8, 8)}))["a"] for t in (1, 2, 4, 5)]
        >>> [getattr(form, "restart", None) for form in forms]
        [None, 0, 0, 1]
    """

    first: Form
    start: When
    every: When
    form: Adapted
    rewarm: int = 100

    moments = "prune"

    def __post_init__(self) -> None:
        if self.start:
            Phases((0, self.start), (self.first, self.form))  # says what is wrong with the moment
        if not self.every > 0 or (isinstance(self.every, float) and self.every > 1):
            raise ValueError(
                "an adapter lasts at least one step (int) or a share of the run (float in (0, 1]), "
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
    start: When = 0.25,
    every: When = 0.25,
    alpha: float = 32.0,
    rewarm: int = 100,
    decomposition: str = "svd",
    execution: AdaptedExecution = "auto",
) -> Restarts:
    """Full-rank until ``start``, then adapters: each is merged after ``every`` and another follows.

    Give its other two parts to the scheduler: ``RankScheduler(..., moments="prune",
    rewarm=schedule.rewarm)``.

    Args:
        rank: of the adapters.
        start: when the full-rank warm start ends, a share of the run (float) or a step (int);
            0 for none.
        every: how long an adapter lasts, likewise.
        alpha: the adapter's scale is ``alpha / rank``.
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
