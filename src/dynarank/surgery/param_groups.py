"""Which parameter group each new parameter goes to, and where in it.

A parameter takes the place of the old one of its name. One that is new to its weight takes the
place that this name last had: it is remembered while the weight has another form, so factors in
groups of their own (LoRA+: another rate for ``up``) return there after a full-rank phase. The first
time it stands with the weight's first parameter: a weight made of factors has the options of
``down``, factors made of a weight have the weight's.

Lists of parameters are changed in place, since some optimizers keep the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.nn import Parameter

from dynarank.surgery.edit import Edit

__all__ = ["Contents", "Group", "regroup"]

Contents: TypeAlias = list[tuple[Any, Any]]  # dictionaries or lists, and what they are to hold
Group: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[ref[nn.Module], str]  # a module, and the name of a parameter of it


@dataclass(frozen=True)
class _Place:
    """A place in a group: of a parameter, or free for the parameter of this key."""

    name: str = ""  # in the group's param_names
    parameter: Parameter | None = None
    key: Key | None = None


_Cell: TypeAlias = list[_Place]  # what becomes of one place
_Free: TypeAlias = list[tuple[int, Key]]  # free places, each with the number of parameters before

# By optimizer: the free places of each group, by its number and the identity of its list, so that
# they are forgotten if the user makes other groups; under _NONE, of parameters in no group.
_FREE: WeakKeyDictionary[Any, dict[tuple[int, int], _Free]] = WeakKeyDictionary()
_NONE = (-1, 0)


def regroup(optimizer: Any, groups: Sequence[Group], edits: Sequence[Edit]) -> Contents:
    """What the groups of an optimizer (and of those it wraps) are to hold after ``edits``."""
    if not edits:
        return []
    free = _FREE.setdefault(optimizer, {})
    keys = [(i, id(group["params"])) for i, group in enumerate(groups)]
    rows = [_cells(group, free.get(key, ())) for key, group in zip(keys, groups, strict=True)]
    index: dict[object, _Cell] = {}
    for cell in (cell for row in rows for cell in row):
        if index.setdefault(cell[0].key or id(cell[0].parameter), cell) is not cell:
            cell.clear()  # the same parameter twice
    outside = {key for _, key in free.get(_NONE, ())}
    for edit in edits:
        _place(edit, index, outside)
    left: dict[tuple[int, int], _Free] = {_NONE: [(0, key) for key in outside]}
    contents: Contents = [(free, left)]
    for at, group, row in zip(keys, groups, rows, strict=True):
        members: list[_Place] = []
        left[at] = []
        for place in (place for cell in row for place in cell):
            if place.key is None:
                members.append(place)
            elif place.key[0]() is not None:
                left[at].append((len(members), place.key))
        contents += _columns(group, members)
    return contents


def _cells(group: Group, free: Sequence[tuple[int, Key]]) -> list[_Cell]:
    """One cell for each parameter of a group and for each free place."""
    parameters: Sequence[Parameter] = group["params"]
    names: Sequence[str] = group.get("param_names", [""] * len(parameters))
    cells = [[_Place(name, p)] for name, p in zip(names, parameters, strict=True)]
    for position, key in reversed(free):
        cells.insert(position, [_Place(key=key)])
    return cells


def _place(edit: Edit, index: dict[object, _Cell], outside: set[Key]) -> None:
    """Free the places of an edit's old parameters, and give its new ones places."""
    module, first, stem = ref(edit.site.module), None, ""
    bases = [name for name in edit.old if edit.site.spec.is_base(name)]
    for name in (*(name for name in edit.old if name not in bases), *bases):
        cell = index.get(id(edit.old[name]))
        if cell is None:
            outside.add((module, name))
            continue
        stem = stem or cell[0].name.rpartition(".")[0]
        first = first or cell
        cell[:] = [_Place(key=(module, name))]
        index[module, name] = cell
        outside.discard((module, name))
    if first is None:  # frozen, and in no group
        return
    at, number = first, 0
    for name, p in edit.trained.items():
        if p.requires_grad or (module, name) not in outside:
            place = _Place(f"{stem}.{name}".lstrip("."), p)
            if (own := index.get((module, name))) is not None:
                at, number = own, [one.key for one in own].index((module, name))
                at[number] = place
            else:
                at.insert(number, place)
            number += 1


def _columns(group: Group, members: Sequence[_Place]) -> Contents:
    """The group's parameters, and their names if it has them."""
    columns = {"params": [m.parameter for m in members], "param_names": [m.name for m in members]}
    columns = {key: new for key, new in columns.items() if key in group}
    if all(isinstance(group[key], list) for key in columns):
        return [(group[key], new) for key, new in columns.items()]
    return [(group, {**group, **columns})]
