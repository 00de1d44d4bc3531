"""The optimizer through a change of form: its groups, and the states of the weights that change.

All of it is computed first, then committed by moving references. The moments themselves are
computed in :mod:`dynarank.surgery.moments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dynarank.decompositions import UnfitWeightError, precise
from dynarank.surgery.edit import Edit
from dynarank.surgery.moments import (
    COUNTERS,
    FIRST_MOMENTS,
    SECOND_MOMENTS,
    Averaging,
    GradientSamples,
    Side,
    carry,
    prune,
)

__all__ = ["Moments", "Optimizers", "as_list", "check_movable", "prepare_optimizer_edit"]

Moments: TypeAlias = Literal["project", "calibrated", "reset", "prune"] | GradientSamples
Optimizers: TypeAlias = Optimizer | Iterable[Optimizer] | None

POLICIES = ("project", "calibrated", "reset", "prune")
MOVABLE = ("SGD", "Adam", "AdamW", "RAdam")


@dataclass(frozen=True)
class OptimizerEdit:
    """The contents that groups and states of the optimizers are to have."""

    contents: Sequence[tuple[dict[Any, Any], Mapping[Any, Any]]] = ()

    def commit(self, undo: ExitStack) -> None:
        """Write them; ``undo`` gets what takes it back."""
        for table, new in self.contents:
            undo.callback(_fill, table, dict(table))
            _fill(table, new)


def _fill(table: dict[Any, Any], contents: Mapping[Any, Any]) -> None:
    table.clear()
    table.update(contents)


def as_list(optimizers: Optimizers) -> list[Optimizer]:
    """The optimizers as a list, none as an empty one."""
    if optimizers is None:
        return []
    found = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for one in found:
        if not (hasattr(one, "param_groups") and hasattr(one, "state")):
            raise TypeError(f"optimizer is a torch optimizer or a list of them, got {one!r}")
    return found


def check_movable(optimizers: Sequence[Optimizer], moments: Moments) -> None:
    """Raise for an optimizer of torch's whose state is not known how to move.

    Raises:
        ValueError: such an optimizer, unless ``moments="reset"``.
    """
    for one in optimizers:
        name, library = type(one).__name__, type(one).__module__
        if moments != "reset" and library.startswith("torch.optim") and name not in MOVABLE:
            raise ValueError(
                f"the state of {name} is not known how to move through a change of form (known: "
                f"{', '.join(MOVABLE)}); use moments='reset'"
            )


def prepare_optimizer_edit(
    edits: Sequence[Edit], optimizers: Sequence[Optimizer], moments: Moments
) -> OptimizerEdit:
    """Compute what the optimizers must hold after ``edits``; change nothing.

    Each new parameter takes the place of the old ones, in their group and position; the moments
    follow by the policy, see :func:`dynarank.apply_plan`.

    Raises:
        ValueError: unknown policy; a layer that trains is in no optimizer, or in two; but for
            ``"reset"``, the optimizer keeps a state that is not known how to move.
    """
    if moments not in POLICIES and not hasattr(moments, "of"):
        raise ValueError(
            f"moments is {', '.join(map(repr, POLICIES))} or a GradientWindow, got {moments!r}"
        )
    owners = [(edit, _owner(edit, optimizers)) for edit in edits] if optimizers else []
    contents: list[tuple[dict[Any, Any], Mapping[Any, Any]]] = []
    for optimizer in optimizers:
        mine = [edit for edit, owner in owners if owner is optimizer]
        contents += _regroup(optimizer, mine)
        old = {p for edit in mine for p in edit.old.values() if p in optimizer.state}
        if old:
            kept = {p: state for p, state in optimizer.state.items() if p not in old}
            moved = [pair for edit in mine for pair in _states(optimizer, edit, moments)]
            contents.append((optimizer.state, {**kept, **dict(moved)}))
    return OptimizerEdit(contents)


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


def _regroup(
    optimizer: Optimizer, edits: Sequence[Edit]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The new contents of every group that holds an edited layer."""
    edit_of = {id(p): edit for edit in edits for p in edit.old.values()}
    placed: set[int] = set()
    result: list[tuple[dict[str, Any], dict[str, Any]]] = []
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
                new = _trained(edit, edit.new).items()
                members += [(f"{stem}.{n}".lstrip("."), p) for n, p in new]
        contents = {**group, "params": [p for _, p in members]}
        if "param_names" in group:
            contents["param_names"] = [n for n, _ in members]
        result.append((group, contents))
    return result


def _trained(edit: Edit, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Those that train: all but the base."""
    return {name: p for name, p in parameters.items() if not edit.site.spec.is_base(name)}


def _states(
    optimizer: Optimizer, edit: Edit, moments: Moments
) -> list[tuple[Parameter, dict[str, Any]]]:
    """The states of the edit's new parameters; those that start as new ones have none."""
    old, new = (list(_trained(edit, one).values()) for one in (edit.old, edit.new))
    if not any(p in optimizer.state for p in edit.old.values()):
        return []
    group = next(g for g in optimizer.param_groups if any(p is old[0] for p in g["params"]))
    moved: list[dict[str, Any]] = [{} for _ in new]
    if moments != "reset":
        moved = _moved(edit, [optimizer.state.get(p, {}) for p in old], group, moments)
    # Torch's fused SGD wants a buffer in all parameters of a group or in none.
    if group.get("momentum") and group.get("fused"):
        moved = [state or {"momentum_buffer": torch.zeros(())} for state in moved]
    return [(p, _fit(state, p)) for p, state in zip(new, moved, strict=True) if state]


def _moved(
    edit: Edit, states: Sequence[dict[str, Any]], group: dict[str, Any], moments: Moments
) -> list[dict[str, Any]]:
    """The states as :func:`dynarank.surgery.moments.carry` or ``prune`` has them, in fp64."""
    site, spec = edit.site, edit.site.spec
    _check_states(site.path, states)
    if not any(value is not None for state in states for value in state.values()):
        return [{} for _ in _trained(edit, edit.new)]
    if moments == "prune" and edit.restarts:
        return prune(states)
    old = Side.of(spec, edit.change.before, {n: precise(p) for n, p in edit.old.items()})
    new = Side.of(spec, edit.change.after, {n: precise(p) for n, p in edit.new.items()})
    samples = [] if isinstance(moments, str) else moments.of(site.trained())
    return carry(old, new, states, Averaging.of(group), samples)


def _fit(state: dict[str, Any], parameter: Parameter) -> dict[str, Any]:
    """Each moment in the parameter's dtype, device and memory layout."""
    return {
        key: value if key in COUNTERS else torch.empty_like(parameter).copy_(value).detach()
        for key, value in state.items()
    }


def _check_states(path: str, states: Sequence[Mapping[str, Any]]) -> None:
    known = FIRST_MOMENTS + SECOND_MOMENTS + COUNTERS
    present = {key: v for state in states for key, v in state.items() if v is not None}
    if unknown := [key for key in present if key not in known]:
        raise ValueError(
            f"layer {path!r}: the optimizer keeps {', '.join(unknown)}, which is not known how to "
            f"move (known: {', '.join(known)}, of SGD, Adam and AdamW); use moments='reset'"
        )
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    if not all(torch.isfinite(value).all() for value in tensors):
        raise UnfitWeightError(
            f"layer {path!r}: the optimizer's state holds NaN or infinite values"
        )
