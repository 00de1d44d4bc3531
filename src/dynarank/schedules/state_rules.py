"""Rules for the states of schedules, by which a saved one is checked before it is used."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

__all__ = ["Rule", "check_fields", "is_count", "is_number", "is_step_or_none", "mapping_of"]

Rule: TypeAlias = Callable[[Any], bool]


def is_count(value: object) -> bool:
    """A whole number of at least 0."""
    return type(value) is int and value >= 0


def is_number(value: object) -> bool:
    """A finite number."""
    return type(value) in (int, float) and math.isfinite(cast(float, value))


def is_step_or_none(value: object) -> bool:
    """A step, or None for one that has not come."""
    return value is None or is_count(value)


def mapping_of(rule: Rule, paths: Mapping[str, Any]) -> Rule:
    """A mapping from some of these paths to values that follow a rule."""

    def follows(value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        found = cast(Mapping[Any, Any], value)
        return set(found) <= set(paths) and all(map(rule, found.values()))

    return follows


def check_fields(state: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raise ValueError unless the state has exactly these fields, each following its rule.

    Example:
        >>> check_fields({"phase": 1}, {"phase": is_count})
    """
    wrong = sorted(map(str, set(state) ^ set(rules)))
    wrong = wrong or [name for name, rule in rules.items() if not rule(state[name])]
    if wrong:
        shown = {name: reprlib.repr(state.get(name, "missing")) for name in wrong}
        raise ValueError(f"no such state can arise: {shown}")
