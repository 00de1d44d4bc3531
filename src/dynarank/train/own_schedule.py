"""A rank schedule of a user's own: a function that makes one, or that is one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynarank.schedules.base import RankSchedule, as_schedule
from dynarank.train.own_code import accepted, calling
from dynarank.train.recipe_error import RecipeError

__all__ = ["own_schedule"]


def own_schedule(
    value: Any, reference: str, options: Mapping[str, Any], folder: Path
) -> RankSchedule:
    """The schedule that a reference names.

    Args:
        value: a schedule, a function ``(clock, readings) -> plan``, or a function (or class) that
            returns one; such a function gets those of ``options`` that it has parameters for.
        reference: its name.
        options: the recipe's.
        folder: the recipe's folder.

    Raises:
        RecipeError: it is none of these, or raised an exception.
    """
    made = value
    if not isinstance(value, RankSchedule) and not _answers(value):
        with calling(f"schedule {reference!r}", folder):
            made = value(**accepted(value, options))
    if isinstance(made, RankSchedule) or _answers(made):
        return as_schedule(made)
    raise RecipeError(
        f"schedule {reference!r} must return a rank schedule (such as "
        f"dr.schedules.low_rank(rank=8)) or be a function (clock, readings), got {made!r}"
    )


def _answers(value: Any) -> bool:
    """Whether a value is a function of clock and readings."""
    if not callable(value) or isinstance(value, type):
        return False
    return list(inspect.signature(value).parameters)[:2] == ["clock", "readings"]
