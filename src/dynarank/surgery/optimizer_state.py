"""The optimizer through a change of form: its groups, and the states of the weights that change.

What becomes of the moments is said in :mod:`dynarank.surgery.moments`. All of
it is computed first, then committed by moving references.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dynarank.decompositions import UnfitWeightError, precise
from dynarank.monitors.gradient_window import GradientWindow
from dynarank.surgery.edit import Edit
from dynarank.surgery.moments import (
    COUNTERS,
    FIRST_MOMENTS,
    SECOND_MOMENTS,
    Averaging,
    Side,
    carry,
    prune,
)

__all__ = [
    "Moments",
    "OptimizerEdit",
    "Optimizers",
    "as_list",
    "check_movable",
    "prepare_optimizer_edit",
]

Moments: TypeAlias = Literal["project", "calibrated", "reset", "prune"] | GradientWindow
Optimizers: TypeAlias = Optimizer | Iterable[Optimizer] | None

POLICIES = ("project", "calibrated", "reset", "prune")
MOVABLE = ("SGD", "Adam", "AdamW", "RAdam")


@dataclass
class OptimizerEdit:
    """Prepared contents of the optimizers' groups and states, committed or undone as a whole."""

    groups: list[tuple[dict[str, Any], dict[str, list[Any]]]] = field(default_factory=list)
    states: list[tuple[Optimizer, Parameter, dict[str, Any]]] = field(default_factory=list)
    dropped: list[tuple[Optimizer, Parameter]] = field(default_factory=list)
    _undo: list[tuple[Any, dict[Any, Any]]] = field(default_factory=list)

    def commit(self) -> None:
        """Write the groups and states."""
        states = {id(o): o.state for o, *_ in (*self.dropped, *self.states)}
        changing: list[dict[Any, Any]] = [*(group for group, _ in self.groups), *states.values()]
        self._undo = [(mapping, dict(mapping)) for mapping in changing]
        for group, contents in self.groups:
            group.update(contents)
        for optimizer, parameter in self.dropped:
            del optimizer.state[parameter]
        for optimizer, parameter, state in self.states:
            optimizer.state[parameter] = state

    def undo(self) -> None:
        """Take back ``commit``; nothing if it was not called."""
        for mapping, contents in self._undo:
            mapping.clear()
            mapping.update(contents)


def as_list(optimizers: Optimizers) -> list[Optimizer]:
    """The optimizers as a list, none as an empty one.

    Raises:
        TypeError: something else than an optimizer or several.
    """
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

    Each new parameter takes the place of the old ones, in their group and position; moments follow
    by policy: ``"project"`` from the old moments alone, gradients (``"calibrated"``) by those of
    the layer that they hold and like ``"project"`` if there are none, ``"reset"`` as if the
    optimizer had never stepped on the layer (its step counter with it), ``"prune"`` by zeroing most
    of an adapter's moments where another one follows it, and else like ``"project"``.

    Raises:
        ValueError: unknown policy; a layer that trains is in no optimizer, or in two; but for
            ``"reset"``, the optimizer keeps a state that is not known how to move.
    """
    if not isinstance(moments, GradientWindow) and moments not in POLICIES:
        raise ValueError(
            f"moments is {', '.join(map(repr, POLICIES))} or a GradientWindow, got {moments!r}"
        )
    transport = OptimizerEdit()
    if not optimizers:
        return transport
    owners = [(edit, _owner(edit, optimizers)) for edit in edits]
    for optimizer in optimizers:
        mine = [edit for edit, owner in owners if owner is optimizer]
        transport.groups += _regroup(optimizer, mine)
        for edit in mine:
            old = [p for p in edit.old.values() if p in optimizer.state]
            transport.dropped += [(optimizer, p) for p in old]
            if old:
                states = _states(optimizer, edit, moments)
                transport.states += [(optimizer, p, state) for p, state in states]
    return transport


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
        f"layer {edit.path!r} trains, but {count} its parameters ({', '.join(edit.old)}); pass the "
        "one that does as optimizer= (a list if there are several), or freeze the layer first"
    )


def _regroup(
    optimizer: Optimizer, edits: Sequence[Edit]
) -> list[tuple[dict[str, Any], dict[str, list[Any]]]]:
    """The new contents of every group that holds an edited layer."""
    edit_of = {id(p): edit for edit in edits for p in edit.old.values()}
    placed: set[int] = set()
    result: list[tuple[dict[str, Any], dict[str, list[Any]]]] = []
    for group in optimizer.param_groups:
        if not any(id(p) in edit_of for p in group["params"]):
            continue
        names = group.get("param_names", [""] * len(group["params"]))
        members: list[tuple[str, Parameter]] = []
        for name, parameter in zip(names, group["params"], strict=True):
            edit = edit_of.get(id(parameter))
            if edit is None:
                members.append((name, parameter))
            elif id(edit) not in placed:
                placed.add(id(edit))
                stem = name.rpartition(".")[0]
                members += [
                    (f"{stem}.{n}".lstrip("."), p) for n, p in _held(edit, edit.new).items()
                ]
        contents: dict[str, list[Any]] = {"params": [p for _, p in members]}
        if "param_names" in group:
            contents["param_names"] = [n for n, _ in members]
        result.append((group, contents))
    return result


def _held(edit: Edit, parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """Those that train: all but the base."""
    return {name: p for name, p in parameters.items() if not edit.site.spec.is_base(name)}


def _states(
    optimizer: Optimizer, edit: Edit, moments: Moments
) -> list[tuple[Parameter, dict[str, Any]]]:
    """The states of the edit's new parameters; those that start as new ones have none."""
    held, fresh = list(_held(edit, edit.old).values()), list(_held(edit, edit.new).values())
    group = _group(optimizer, held)
    moved: list[dict[str, Any]] = [{} for _ in fresh]
    if moments != "reset":
        moved = _carried(edit, [optimizer.state.get(p, {}) for p in held], group, moments)
    # Torch's fused SGD wants a buffer in all parameters of a group or in none.
    if "momentum" in group and group["momentum"] and group.get("fused"):
        moved = [state or {"momentum_buffer": torch.zeros(())} for state in moved]
    return [(p, _fit(state, p)) for p, state in zip(fresh, moved, strict=True) if state]


def _carried(
    edit: Edit,
    states: Sequence[dict[str, Any]],
    group: dict[str, Any],
    moments: Moments,
) -> list[dict[str, Any]]:
    """The states as :func:`dynarank.surgery.moments.carry` or ``prune`` has them, in fp64."""
    spec = edit.site.spec
    keys = list(dict.fromkeys(k for state in states for k in state if state[k] is not None))
    _check_known(edit.path, keys)
    _check_finite(edit.path, states)
    if not keys:
        return [{} for _ in _held(edit, edit.new)]
    if moments == "prune" and edit.restarts:
        return prune(states)
    old = Side.of(spec, edit.before, {n: precise(p) for n, p in edit.old.items()})
    new = Side.of(spec, edit.after, {n: precise(p) for n, p in edit.new.items()})
    held = list(_held(edit, edit.old).values())
    samples = moments.of(held) if isinstance(moments, GradientWindow) else []
    return carry(old, new, states, Averaging.of(group), samples)


def _group(optimizer: Optimizer, held: Sequence[Parameter]) -> dict[str, Any]:
    """The group of the first of these parameters."""
    return next(g for g in optimizer.param_groups if any(p is held[0] for p in g["params"]))


def _fit(state: dict[str, Any], parameter: Parameter) -> dict[str, Any]:
    """Each moment in the parameter's dtype, device and memory layout."""
    return {
        key: value if key in COUNTERS else torch.empty_like(parameter).copy_(value).detach()
        for key, value in state.items()
    }


def _check_known(path: str, keys: Sequence[str]) -> None:
    known = FIRST_MOMENTS + SECOND_MOMENTS + COUNTERS
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(
            f"layer {path!r}: the optimizer keeps {', '.join(unknown)}, which is not known how to "
            f"move (known: {', '.join(known)}, of SGD, Adam and AdamW); use moments='reset'"
        )


def _check_finite(path: str, states: Sequence[dict[str, Any]]) -> None:
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    if not all(torch.isfinite(value).all() for value in tensors):
        raise UnfitWeightError(
            f"layer {path!r}: the optimizer's state holds NaN or infinite values"
        )
