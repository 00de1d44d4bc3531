"""What a change of form does to the optimizer: its groups, own lists and the weights' states.

All of it is computed first (the moments in :mod:`dynarank.surgery.moments`), then written. What
each optimizer keeps is in :mod:`dynarank.surgery.state_layout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

from dynarank.decompositions import precise
from dynarank.forms import Change, Form, same_weight
from dynarank.surgery.edit import Edit, restore_on_exit
from dynarank.surgery.moments import (
    GradientSamples,
    carry,
    check_known,
    check_states,
    prune,
    settled,
)
from dynarank.surgery.own_references import follow, groups_of, is_optimizer, wrapped
from dynarank.surgery.param_groups import Contents, Group, regroup
from dynarank.surgery.side import Side
from dynarank.surgery.site import Site
from dynarank.surgery.state_layout import (
    MOVABLE,
    Averaging,
    StateLayout,
    layout_of,
    torch_class,
)
from dynarank.surgery.unfit import UnfitLayers
from dynarank.surgery.weight_average import moved_average

__all__ = [
    "Moments",
    "Optimizers",
    "as_list",
    "check_followable",
    "check_held",
    "check_movable",
    "new_contents",
    "write",
]

Moments: TypeAlias = Literal["project", "calibrated", "reset", "prune"] | GradientSamples
Optimizers: TypeAlias = Optimizer | Iterable[Optimizer] | None

POLICIES = ("project", "calibrated", "reset", "prune")


def as_list(optimizers: Optimizers) -> list[Optimizer]:
    """The optimizers as a list; None as an empty one."""
    if optimizers is None:
        return []
    found = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for one in found:
        if not is_optimizer(one):
            raise TypeError(f"optimizer is a torch optimizer or a list of them, got {one!r}")
    return found


def check_movable(optimizers: Iterable[Any], moments: Moments, sites: Iterable[Site] = ()) -> None:
    """Raise ValueError for an optimizer whose state cannot be moved, unless it is reset.

    Of torch's optimizers the class tells; of others, the states that the weights of ``sites`` have.
    """
    if moments == "reset":
        return
    families = [wrapped(optimizer) for optimizer in optimizers]
    for one in (one for family in families for one in family):
        if torch_class(one) not in ("Optimizer", *MOVABLE):
            raise ValueError(
                f"the state of {type(one).__name__} cannot be moved through a change of form (only "
                f"that of {', '.join(MOVABLE)}); use moments='reset'"
            )
    stores = [one for family in families for one in _stores(family)]
    for site in sites:
        for one in stores:
            found = [one.state[p] for p in site.trained() if p in one.state]
            check_known(site.path, map(_as_dict, found), layout_of(one))


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
        homes = _homes(groups, regrouped)
        for one in _stores(family):
            contents += _new_states(one, groups, homes, mine, moments, unfit)
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


def check_followable(wanted: Iterable[tuple[Site, Form]], optimizers: Sequence[Any]) -> None:
    """Raise ValueError for an optimizer that holds these weights where it could not follow them."""
    edits = [
        Edit(site, Change(site.path, after, after, 0.0), site.parameters(), {})
        for site, after in wanted
    ]
    for family in map(wrapped, optimizers):
        held = {id(p) for group in groups_of(family) for p in group["params"]}
        mine = [one for one in edits if any(id(p) in held for p in one.old.values())]
        follow(family, mine, [])


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


def _new_states(
    optimizer: Any,
    groups: Sequence[Group],
    homes: Mapping[int, Group],
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
            moved |= dict(_states(optimizer, groups, homes, edit, moments))
    check_movable([optimizer], moments)
    kept = {} if flat else {p: one for p, one in state.items() if p not in old}
    return [(state, {**kept, **moved})]


def _stores(family: Sequence[Any]) -> list[Any]:
    """Those of an optimizer and the ones it wraps that keep states; of one state, the innermost."""
    return [*{id(one.state): one for one in family if isinstance(one.state, dict)}.values()]


def _homes(groups: Sequence[Group], regrouped: Contents) -> dict[int, Group]:
    """The group of each parameter after a change, by the parameter's id."""
    new = {id(table): one for table, one in regrouped}
    after = [(group, new.get(id(group), group)["params"]) for group in groups]
    return {id(p): group for group, params in after for p in new.get(id(params), params)}


def _states(
    optimizer: Any,
    groups: Sequence[Group],
    homes: Mapping[int, Group],
    edit: Edit,
    moments: Moments,
) -> list[tuple[Parameter, dict[str, Any]]]:
    """The states of the edit's new parameters; those that start without state are left out."""
    old, new = edit.site.trained(), edit.trained.values()
    if not any(p in optimizer.state for p in old):
        return []
    if edit.shards is not None:  # they were moved when the weight was whole
        ready = edit.shards.states.get(id(optimizer.state), {})
        return [(edit.new[name], state) for name, state in ready.items()]
    found: list[Any] = [optimizer.state.get(p, {}) for p in old]
    states = list(map(_as_dict, found))
    like = {key: v for s in states for key, v in s.items() if isinstance(v, Tensor)}
    known = {id(p): group for group in groups for p in group["params"]}
    options = [known[id(p)] for p in old if id(p) in known]
    layout, moved = layout_of(optimizer), list[dict[str, Any]]([{}] * len(new))
    if not (restart := moments == "reset"):
        check_states(edit.site.path, states, layout)
        own = [known.get(id(p), options[0]) for p in old]
        states = [layout.read(s, g) for s, g in zip(states, own, strict=True)]
        moved = _moved(edit, states, layout, options, moments)
    there = [homes.get(id(p), options[0]) for p in new]
    moved = [
        layout.written(state, group) if state else layout.fresh(states, group, restart)
        for state, group in zip(moved, there, strict=True)
    ]
    if options[0].get("momentum") and options[0].get("fused"):
        # Fused SGD wants a buffer in all or in none.
        moved = [state or {"momentum_buffer": torch.zeros((), device="cpu")} for state in moved]
    whole = not any(p.requires_grad for p in new)  # frozen; else a frozen factor has no state
    pairs = zip(new, moved, strict=True)
    kept = [(p, _fit(s, p, like, layout)) for p, s in pairs if s and (p.requires_grad or whole)]
    return settled(edit.site.path, kept)


def _as_dict(state: Any) -> dict[str, Any]:
    return state if isinstance(state, dict) else {type(state).__name__: state}


def _averaging(layout: StateLayout, groups: Sequence[Group]) -> Averaging:
    """That of a weight with parameters in these groups: the first one's, with the largest decay."""
    all_of_them = [layout.averaging(group) for group in groups]
    return replace(all_of_them[0], decay=max(one.decay for one in all_of_them))


def _moved(
    edit: Edit,
    states: Sequence[dict[str, Any]],
    layout: StateLayout,
    groups: Sequence[Group],
    moments: Moments,
) -> list[dict[str, Any]]:
    """The states, read by the layout, after :func:`carry` or :func:`prune`, in fp64."""
    site, change = edit.site, edit.change
    if moments == "prune" and same_weight(change.before, change.after, restarted=True):
        return [prune(state, layout=layout) for state in states]
    began = () if site.spec.span else site.factor_norms
    old = Side.of(site.spec, change.before, {n: precise(p) for n, p in edit.old.items()}, began)
    new = Side.of(site.spec, change.after, {n: precise(p) for n, p in edit.new.items()})
    samples = [] if isinstance(moments, str) else moments.of(site.trained())
    moved = carry(old, new, states, _averaging(layout, groups), samples, layout)
    for key in layout.weights:
        averages = moved_average(edit, new, [state.get(key) for state in states])
        counted = layout.common(states)
        moved = [{**counted, **s, key: v} for s, v in zip(moved, averages, strict=True)]
    return moved


def _fit(
    state: dict[str, Any], parameter: Parameter, like: dict[str, Tensor], layout: StateLayout
) -> dict[str, Any]:
    """A copy, each average in the parameter's layout, and dtype and device of the old one."""
    fitted: dict[str, Any] = {}
    for key, v in state.items():
        if key in layout.scalars:
            fitted[key] = deepcopy(v)
            continue
        old = like.get(key, parameter)
        fitted[key] = torch.empty_like(parameter, dtype=old.dtype, device=old.device)
        if key in layout.stored:  # it has a shape of its own
            fitted[key] = torch.empty_like(v, dtype=old.dtype, device=old.device)
        fitted[key].copy_(v).detach_()
        if key in like and not old.is_cuda and old.is_shared():
            fitted[key].share_memory_()
    return fitted
