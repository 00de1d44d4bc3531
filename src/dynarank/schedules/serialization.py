"""Serialization of schedules to plain data, for run configurations and checkpoints.

All built-in schedules and their parts are frozen dataclasses: they are written as the class name
and the fields, and constructed from these with the usual checks. A user's own function is code, not
data, and is rejected.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

import dynarank.schedules as schedules
from dynarank.files.printable import printable
from dynarank.form_data import form_from_data, form_to_data
from dynarank.forms import Adapted, FullRank, LowRank, Rank, Within
from dynarank.schedules.base import Decision, FunctionSchedule, RankSchedule

__all__ = ["schedule_from_data", "schedule_to_data", "serializable"]

_T = TypeVar("_T")

# Parts of schedules and users' own schedules; the built-in ones are listed in schedules.CLASSES.
_CLASSES: dict[str, type[Any]] = {"Decision": Decision, "Rank": Rank, "Within": Within}
_PARTS = ("Decision", "Rank", "Within")  # not schedules themselves
_CLASS, _MAP = "class", "map"  # the keys that mark a dataclass and a mapping


def serializable(cls: type[_T]) -> type[_T]:
    """Register your own frozen dataclass by its name, so that it can be serialized (a decorator).

    The schedules of :mod:`dynarank.schedules` are registered already. Fields may hold numbers,
    strings, None, forms, ranks, decisions, other registered classes, and sequences and mappings
    (with strings as keys) of these. A sequence comes back as a tuple.

    Raises:
        ValueError: a class that is not a dataclass, or a name that is taken.
    """
    name = cls.__name__
    if not is_dataclass(cls):
        raise ValueError(
            f"{name} is not a dataclass; write @serializable above @dataclass(frozen=True), so "
            "that it is applied last"
        )
    if name in schedules.CLASSES or _CLASSES.setdefault(name, cls) is not cls:
        raise ValueError(
            f"the name {name} is taken, and data names a schedule by its class; registered are "
            f"{_names()}; give yours another name"
        )
    return cls


def _class_named(name: object) -> type[Any] | None:
    """The class of this name, imported if it is a built-in one; None: unknown."""
    if not isinstance(name, str):
        return None
    return getattr(schedules, name) if name in schedules.CLASSES else _CLASSES.get(name)


def _names() -> str:
    return ", ".join(sorted({*schedules.CLASSES, *_CLASSES}))


def schedule_to_data(schedule: RankSchedule) -> dict[str, Any]:
    """Convert a schedule to plain data.

    Raises:
        ValueError: it is, or contains, something that is not registered, such as a user's own
            function.

    Example:
        >>> from dynarank.schedules import low_rank
        >>> schedule_to_data(low_rank(8))
        {'class': 'LowRankThroughout', 'rank': 8, 'decomposition': 'svd'}
    """
    name = type(schedule).__name__
    if _class_named(name) is not type(schedule) or name in _PARTS:
        raise ValueError(_unknown(schedule))
    return _to_data(schedule)


def schedule_from_data(data: Mapping[str, Any]) -> RankSchedule:
    """The inverse of :func:`schedule_to_data`.

    Raises:
        ValueError: an unknown class, unknown or missing fields, or values that the schedule
            rejects.

    Example:
        >>> from dynarank.schedules import low_rank
        >>> schedule_from_data(schedule_to_data(low_rank(8))) == low_rank(8)
        True
    """
    if (_CLASS not in data and ("form" in data or _MAP in data)) or data.get(_CLASS) in _PARTS:
        raise ValueError(f"a schedule's data names its class, got {printable(repr(dict(data)))}")
    try:
        return _made(data)
    except RecursionError:
        raise ValueError("a schedule's data is nested too deeply to be one") from None


def _to_data(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Real):  # numpy's numbers too
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, FullRank | LowRank | Adapted):
        return form_to_data(value)
    if _class_named(type(value).__name__) is type(value):
        held = {f.name: _to_data(getattr(value, f.name)) for f in fields(value) if f.init}
        return {_CLASS: type(value).__name__, **held}
    if isinstance(value, Mapping):
        return {_MAP: {_key(key): _to_data(one) for key, one in value.items()}}
    if isinstance(value, Sequence):
        return [_to_data(one) for one in value]
    raise ValueError(_unknown(value))


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError(f"a mapping in a schedule has strings as keys, got {key!r}")
    return key


def _from_data(data: Any) -> Any:
    if isinstance(data, Mapping):
        if _CLASS not in data and "form" in data:
            return form_from_data(data)
        if _CLASS not in data and _MAP in data:
            return {key: _from_data(value) for key, value in data[_MAP].items()}
        return _made(data)
    if isinstance(data, Sequence) and not isinstance(data, str):
        return tuple(_from_data(one) for one in data)
    return data


def _made(data: Mapping[str, Any]) -> Any:
    values = {key: _from_data(value) for key, value in data.items() if key != _CLASS}
    name = data.get(_CLASS)
    if (cls := _class_named(name)) is None:
        raise ValueError(f"unknown schedule {printable(repr(name))}; known: {_names()}")
    wanted = [f for f in fields(cls) if f.init]
    needed = {f.name for f in wanted if f.default is MISSING and f.default_factory is MISSING}
    if (wrong := values.keys() - {f.name for f in wanted}) or (wrong := needed - values.keys()):
        raise ValueError(
            f"the data of {name} has the fields {', '.join(f.name for f in wanted)}; unknown or "
            f"missing: {printable(', '.join(sorted(wrong)))}"
        )
    return cls(**values)


def _unknown(value: object) -> str:
    value = value.function if isinstance(value, FunctionSchedule) else value
    what = getattr(value, "__qualname__", None) if inspect.isroutine(value) else None
    return (
        f"{what or repr(value)} cannot be serialized: only registered schedules can "
        f"({_names()}); keep your own function in code and pass it again"
    )
