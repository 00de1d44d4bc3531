"""What a change of form does to the optimizer: its groups, own lists and the weights' states.

All of it is computed first (the moments in :mod:`dynarank.surgery.moments`), then written.

Note [Decoupled decay]
Only SGD, Adam and RAdam of torch (and subclasses) add weight decay to the gradient, unless their
``decoupled_weight_decay`` is set. Of any other optimizer a moment is moved as if there were no
decay in it: most of them decouple it (AdamW, Muon, Lion), and a group does not say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

from dynarank.decompositions import precise
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
from dynarank.surgery.own_references import follow, groups_of, is_optimizer, wrapped
from dynarank.surgery.param_groups import Contents, Group, regroup
from dynarank.surgery.side import Side
from dynarank.surgery.site import Site
from dynarank.surgery.unfit import UnfitLayers

__all__ = [
    "Moments",
    "Optimizers",
    "as_list",
    "check_held",
    "check_movable",
    "new_contents",
    "write",
]

Moments: TypeAlias = Literal["project", "calibrated", "reset", "prune"] | GradientSamples
Optimizers: TypeAlias = Optimizer | Iterable[Optimizer] | None

POLICIES = ("project", "calibrated", "reset", "prune")
MOVABLE = ("SGD", "Adam", "AdamW", "RAdam", "Muon")  # of torch; of others their states decide
L2_DECAY = ("SGD", "Adam", "RAdam")  # see Note [Decoupled decay]


def as_list(optimizers: Optimizers) -> list[Optimizer]:
    """The optimizers as a list; None as an empty one."""
    if optimizers is None:
        return []
    found = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for one in found:
        if not is_optimizer(one):
            raise TypeError(f"optimizer is a torch optimizer or a list of them, got {one!r}")
    return found


def check_movable(optimizers: Iterable[Any], moments: Moments) -> None:
    """Raise ValueError for a torch optimizer whose state cannot be moved, unless it is reset."""
    for one in (one for optimizer in optimizers for one in wrapped(optimizer)):
        if moments != "reset" and _torch_class(one) not in ("Optimizer", *MOVABLE):
            raise ValueError(
                f"the state of {type(one).__name__} cannot be moved through a change of form (only "
                f"that of {', '.join(MOVABLE)}); use moments='reset'"
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
        UnfitWeightError: states that are not finite, or cannot be computed.
    """
    if moments not in POLICIES and not hasattr(moments, "of"):
        raise ValueError(
            f"moments is {', '.join(map(repr, POLICIES))} or a GradientWindow, got {moments!r}"
        )
    families = [wrapped(optimizer) for optimizer in optimizers]
    changed = [edit for edit in edits if edit.old] if optimizers else []
    owners = [(edit, _owner(edit.site, families)) for edit in changed]
    contents: Contents = []
    unfit = UnfitLayers()
    for family in families:
        mine, groups = [edit for edit, owner in owners if owner is family], groups_of(family)
        regrouped = regroup(family[-1], groups, mine)
        tables = {id(one.state): one for one in family if isinstance(one.state, dict)}
        for one in tables.values():  # of those that share a state, the innermost
            contents += _new_states(one, groups, mine, moments, unfit)
        contents += regrouped + follow(family, mine, regrouped)
    unfit.check()
    return contents


def write(contents: Contents, undo: ExitStack) -> None:
    """Write what the optimizers are to hold; ``undo`` can take it back."""
    for table, new in contents:
        if isinstance(table, list):
            undo.callback(table.__setitem__, slice(None), table[:])
            table[:] = new
        else:
            restore_on_exit(table, undo)
            table.clear()
            table.update(new)


def check_held(sites: Iterable[Site], optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError for a weight that trains, but not in exactly one of the optimizers."""
    families = [wrapped(optimizer) for optimizer in optimizers]
    for site in sites if optimizers else ():
        _owner(site, families)


def _owner(site: Site, families: Sequence[list[Any]]) -> list[Any] | None:
    """The optimizer that holds the weight, and those it wraps; a frozen weight may have none."""
    ids = {id(p) for p in site.parameters().values()}
    found = [f for f in families if any(id(p) in ids for g in groups_of(f) for p in g["params"])]
    if len(found) == 1:
        return found[0]
    if not found and not any(p.requires_grad for p in site.trained()):
        return None
    held = f"its parameters ({', '.join(site.parameters())})"
    if found:
        raise ValueError(
            f"layer {site.path!r} trains, but two optimizers hold {held}; leave them to one, which "
            "may have several groups"
        )
    raise ValueError(
        f"layer {site.path!r} trains, but no optimizer given holds {held}; pass the one that does "
        "as optimizer= (a list if there are several), or freeze it first"
    )


def _torch_class(optimizer: Any) -> str:
    """The class of torch that an optimizer is or derives from."""
    classes = (c for c in type(optimizer).__mro__ if c.__module__.startswith("torch.optim"))
    return next((c.__name__ for c in classes), "Optimizer")


def _new_states(
    optimizer: Any,
    groups: Sequence[Group],
    edits: Sequence[Edit],
    moments: Moments,
    unfit: UnfitLayers,
) -> Contents:
    """The new contents of an optimizer's state."""
    state: dict[Any, Any] = optimizer.state
    old = {p for edit in edits for p in edit.old.values() if p in state}
    flat = isinstance(optimizer, LBFGS)  # one history of all parameters
    if not (old or (flat and edits and state)):
        return []
    moved: dict[Any, Any] = {}
    for edit in edits:
        with unfit.layer(edit.site.path):
            moved |= dict(_states(optimizer, groups, edit, moments))
    check_movable([optimizer], moments)
    kept = {} if flat else {p: one for p, one in state.items() if p not in old}
    return [(state, {**kept, **moved})]


def _states(
    optimizer: Any, groups: Sequence[Group], edit: Edit, moments: Moments
) -> list[tuple[Parameter, dict[str, Any]]]:
    """The states of the edit's new parameters; those that start without state are left out."""
    old, new = edit.site.trained(), edit.trained.values()
    if not any(p in optimizer.state for p in old):
        return []
    found: list[Any] = [optimizer.state.get(p, {}) for p in old]
    states = [s if isinstance(s, dict) else {type(s).__name__: s} for s in found]
    options = [g for one in old for g in groups if any(p is one for p in g["params"])]
    moved: list[dict[str, Any]] = [{} for _ in new]
    if moments != "reset":
        check_states(edit.site.path, states)
        moved = _moved(edit, states, _averaging(optimizer, options), moments)
    if options[0].get("momentum") and options[0].get("fused"):
        # Fused SGD wants a buffer in all or in none.
        moved = [state or {"momentum_buffer": torch.zeros(())} for state in moved]
    if _torch_class(optimizer) == "Adagrad":  # until torch 2.12 it makes its state once
        first = next(state for state in states if state)
        total = torch.tensor(float(options[0]["initial_accumulator_value"]))
        moved = [{"step": torch.zeros_like(first["step"]), "sum": total} for _ in new]
    like = {key: v for s in states for key, v in s.items() if isinstance(v, Tensor)}
    pairs = zip(new, moved, strict=True)
    whole = not any(p.requires_grad for p in new)  # frozen; else a frozen factor has no state
    kept = [(p, _fit(s, p, like)) for p, s in pairs if s and (p.requires_grad or whole)]
    return settled(edit.site.path, kept)


def _averaging(optimizer: Any, groups: Sequence[Group]) -> Averaging:
    """That of a weight with parameters in these groups: the first one's, with the largest decay."""
    if _torch_class(optimizer) not in L2_DECAY:
        return Averaging.of({**groups[0], "weight_decay": 0})
    all_of_them = [Averaging.of(group) for group in groups]
    return replace(all_of_them[0], decay=max(one.decay for one in all_of_them))


def _moved(
    edit: Edit, states: Sequence[dict[str, Any]], averaging: Averaging, moments: Moments
) -> list[dict[str, Any]]:
    """The states after :func:`carry` or :func:`prune`, in fp64."""
    site, change = edit.site, edit.change
    if moments == "prune" and same_weight(change.before, change.after, restarted=True):
        return [prune(state) for state in states]
    began = () if site.spec.span else site.factor_norms
    old = Side.of(site.spec, change.before, {n: precise(p) for n, p in edit.old.items()}, began)
    new = Side.of(site.spec, change.after, {n: precise(p) for n, p in edit.new.items()})
    samples = [] if isinstance(moments, str) else moments.of(site.trained())
    return carry(old, new, states, averaging, samples)


def _fit(state: dict[str, Any], parameter: Parameter, like: dict[str, Tensor]) -> dict[str, Any]:
    """A copy, each moment in the parameter's layout, and dtype and device of the old one."""
    fitted: dict[str, Any] = {}
    for key, v in state.items():
        old = like.get(key, parameter)
        empty = torch.empty_like(parameter, dtype=old.dtype, device=old.device)
        fitted[key] = deepcopy(v) if key == "step" else empty.copy_(v).detach()
        if key in like and not old.is_cuda and old.is_shared():
            fitted[key].share_memory_()
    return fitted
