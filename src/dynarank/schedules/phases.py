"""Manual schedules: one form or budget after another, the same for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dynarank.forms import Form, Request, Within
from dynarank.schedules.base import Clock, RankSchedule, Readings, When, step_of
from dynarank.schedules.options import check_when

__all__ = ["Phases"]


@dataclass(frozen=True)
class Phases(RankSchedule):
    """One form after another for every layer: ``forms[i]`` from ``starts[i]`` on.

    Args:
        starts: the transition points, increasing, the first at 0.
        forms: the forms, one for each start; in place of a form a budget, :class:`dynarank.Within`,
            which all layers share.

    Raises:
        ValueError: no phases, unequal lengths, something that is neither form nor budget, a first
            start that is not 0, starts that do not increase, or a share outside [0, 1].

    Example:
        >>> from dynarank.forms import FullRank, LowRank
        >>> Phases([0.0, 0.25], [FullRank(), LowRank(8)])(Clock(50, 100), Readings({"a": (16, 16)}))
        {'a': LowRank(rank=8, decomposition='svd')}

        Full rank, then two cuts; the ranks are found when the time comes:

        >>> cuts = [FullRank(), Within(flops=0.65), Within(flops=0.45)]
        >>> Phases([0.0, 0.05, 0.3], cuts)(Clock(50, 100), Readings({"a": (16, 16)}))
        {'a': Within(flops=0.45)}
    """

    starts: Sequence[When]
    forms: Sequence[Form | Within]

    def __post_init__(self) -> None:
        if not self.starts or len(self.starts) != len(self.forms):
            raise ValueError(
                f"phases need a start for each form, got {len(self.starts)} starts and "
                f"{len(self.forms)} forms"
            )
        for form in self.forms:
            if not isinstance(form, Form | Within):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(
                    "a phase has a form, FullRank(), LowRank(rank) or Adapted(rank), or a budget, "
                    f"Within(...), got {form!r}"
                )
        starts = tuple(check_when("a phase's start", start) for start in self.starts)
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "forms", tuple(self.forms))
        if starts[0] != 0:
            raise ValueError(f"the first phase starts at 0, got {starts[0]!r}")
        for one, two in pairwise(starts):
            if two == 0 or (type(one) is type(two) and not one < two):
                raise ValueError(f"phases start one after another, got {one!r} then {two!r}")

    def __call__(self, clock: Clock, readings: Readings, /) -> Request:
        """The form of the current phase, for every layer.

        Raises:
            ValueError: shares and steps are mixed, and do not increase in a run of this length.
        """
        steps = [step_of(start, clock.total_steps) for start in self.starts]
        if steps != sorted(steps):
            raise ValueError(
                f"phases start one after another, but {self.starts} are the steps {steps} in a run "
                f"of {clock.total_steps}"
            )
        begun = sum(step <= clock.step for step in steps)
        return dict.fromkeys(readings.layers, self.forms[begun - 1])
