"""What a change of form does to the optimizer: its groups, and the states of the changed weights.

All of it is computed first (the moments in :mod:`dynarank.surgery.moments`), then written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any, Literal, TypeAlias

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from dynarank.decompositions import as_unfit, precise
from dynarank.forms import same_weight
from dynarank.surgery.edit import Edit, restore_on_exit
from dynarank.surgery.moments import (
    Averaging,
    GradientSamples,
    carry,
    check_states,
    prune,
    settled,
)
from dynarank.surgery.side import Side

__all__ = ["Moments", "Optimizers", "as_list", "check_movable", "new_contents", "write"]

Moments: TypeAlias = Literal["project", "calibrated", "reset", "prune"] | GradientSamples
Optimizers: TypeAlias = Optimizer | Iterable[Optimizer] | None
Contents: TypeAlias = list[tuple[dict[Any, Any], dict[Any, Any]]]  # groups or states, and new ones

POLICIES = ("project", "calibrated", "reset", "prune")
MOVABLE = ("SGD", "Adam", "AdamW", "RAdam")


def as_list(optimizers: Optimizers) -> list[Optimizer]:
    """The optimizers as a list; None as an empty one."""
    if optimizers is None:
        return []
    found = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for one in found:
        if not (hasattr(one, "param_groups") and hasattr(one, "state")):
            raise TypeError(f"optimizer is a torch optimizer or a list of them, got {one!r}")
    return found


def check_movable(optimizers: Sequence[Optimizer], moments: Moments) -> None:
    """Raise ValueError for a torch optimizer whose state cannot be moved, unless it is reset."""
    for one in optimizers:
        name, library = type(one).__name__, type(one).__module__
        if moments != "reset" and library.startswith("torch.optim") and name not in MOVABLE:
            raise ValueError(
                f"the state of {name} cannot be moved through a change of form (only that of "
                f"{', '.join(MOVABLE)}); use moments='reset'"
            )


def new_contents(
    edits: Sequence[Edit], optimizers: Sequence[Optimizer], moments: Moments
) -> Contents:
    """Compute what the optimizers must hold after ``edits``; change nothing.

    New parameters take the old ones' position in their group; the moments follow the policy, see
    :func:`dynarank.apply_plan`.

    Raises:
        ValueError: unknown policy; a layer that trains is in no optimizer, or in two; an optimizer
            keeps state that cannot be moved (unless the policy is ``"reset"``).
    """
    if moments not in POLICIES and not hasattr(moments, "of"):
        raise ValueError(
            f"moments is {', '.join(map(repr, POLICIES))} or a GradientWindow, got {moments!r}"
        )
    owners = [(edit, _owner(edit, optimizers)) for edit in edits] if optimizers else []
    contents: Contents = []
    for optimizer in optimizers:
        mine = [edit for edit, owner in owners if owner is optimizer]
        contents += _regroup(optimizer, mine)
        if old := {p for edit in mine for p in edit.old.values() if p in optimizer.state}:
            kept = {p: state for p, state in optimizer.state.items() if p not in old}
            moved = [pair for edit in mine for pair in _states(optimizer, edit, moments)]
            contents.append((optimizer.state, {**kept, **dict(moved)}))
    return contents


def write(contents: Contents, undo: ExitStack) -> None:
    """Write what the optimizers are to hold; ``undo`` can take it back."""
    for table, new in contents:
        restore_on_exit(table, undo)
        table.clear()
        table.update(new)


def _owner(edit: Edit, optimizers: Sequence[Optimizer]) -> Optimizer | None:
    """The optimizer that holds the layer; a frozen layer may have none."""
    ids = {id(p) for p in edit.old.values()}
    found = [
        o for o in optimizers if any(id(p) in ids for g in o.param_groups for p in g["params"])
    ]
    if len(found) == 1:
        return found[0]
    if not found and not any(p.requires_grad for p in edit.new.values()):
        return None
    count = "two optimizers hold" if found else "no optimizer given holds"
    raise ValueError(
        f"layer {edit.site.path!r} trains, but {count} its parameters ({', '.join(edit.old)}); "
        "pass the one that does as optimizer= (a list if there are several), or freeze it first"
    )


def _regroup(optimizer: Optimizer, edits: Sequence[Edit]) -> Contents:
    """The new contents of every group that holds an edited layer."""
    edit_of = {id(p): edit for edit in edits for p in edit.old.values()}
    placed: set[int] = set()
    contents: Contents = []
    for group in optimizer.param_groups:
        if not any(id(p) in edit_of for p in group["params"]):
            continue
        members: list[tuple[str, Parameter]] = []
        names = group.get("param_names", [""] * len(group["params"]))
        for name, parameter in zip(names, group["params"], strict=True):
            edit = edit_of.get(id(parameter))
            if edit is None:
                members.append((name, parameter))
            elif id(edit) not in placed:
                placed.add(id(edit))
                stem = name.rpartition(".")[0]
                members += [(f"{stem}.{n}".lstrip("."), p) for n, p in edit.trained.items()]
        columns = {"param_names": [n for n, _ in members], "params": [p for _, p in members]}
        contents.append((group, {key: columns.get(key, value) for key, value in group.items()}))
    return contents


def _states(
    optimizer: Optimizer, edit: Edit, moments: Moments
) -> list[tuple[Parameter, dict[str, Any]]]:
    """The states of the edit's new parameters; those that start without state are left out."""
    if not any(p in optimizer.state for p in edit.old.values()):
        return []
    old, new = edit.site.trained(), edit.trained.values()
    group = next(g for g in optimizer.param_groups if any(p is old[0] for p in g["params"]))
    moved: list[dict[str, Any]] = [{} for _ in new]
    if moments != "reset":
        moved = _moved(edit, [optimizer.state.get(p, {}) for p in old], group, moments)
    if group.get("momentum") and group.get("fused"):  # fused SGD wants a buffer in all or in none
        moved = [state or {"momentum_buffer": torch.zeros(())} for state in moved]
    pairs = zip(new, moved, strict=True)
    return settled(edit.site.path, [(p, _fit(state, p)) for p, state in pairs if state])


def _moved(
    edit: Edit, states: Sequence[dict[str, Any]], group: dict[str, Any], moments: Moments
) -> list[dict[str, Any]]:
    """The states after :func:`carry` or :func:`prune`, in fp64."""
    site, change = edit.site, edit.change
    check_states(site.path, states)
    if moments == "prune" and same_weight(change.before, change.after, restarted=True):
        return [prune(state) for state in states]
    old = Side.of(site.spec, change.before, {n: precise(p) for n, p in edit.old.items()})
    new = Side.of(site.spec, change.after, {n: precise(p) for n, p in edit.new.items()})
    samples = [] if isinstance(moments, str) else moments.of(site.trained())
    with as_unfit(f"the moments of layer {site.path!r} cannot be moved"):
        return carry(old, new, states, Averaging.of(group), samples)


def _fit(state: dict[str, Any], parameter: Parameter) -> dict[str, Any]:
    """A copy, each moment in the parameter's dtype, device and memory layout."""
    return {
        key: deepcopy(v) if key == "step" else torch.empty_like(parameter).copy_(v).detach()
        for key, v in state.items()
    }
