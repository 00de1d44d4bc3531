"""``model.load_state_dict`` brings a model to the forms of the state, then torch copies the values.

A hook on the model sees the state before any value is copied. Weights that have another form there
get new parameters, at all places of a tied weight, and in the optimizers that hold the old ones. A
full-rank weight of somebody's plain checkpoint is refactored instead: nothing in it says that the
layer is to become full-rank.

All is worked out before anything changes; what cannot be loaded rightly is a ValueError.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

from dynarank.distributed.wrappers import live, one_scan
from dynarank.forms import Change, LowRank
from dynarank.layers import RankedLayer, own_parameters
from dynarank.layers.form_entry import KEY
from dynarank.surgery.committed import check_committed
from dynarank.surgery.edit import Edit, check_names, check_replaceable, like_old, restore_on_exit
from dynarank.surgery.exact_weights import forget, keep
from dynarank.surgery.incoming import Incoming, Load, incoming
from dynarank.surgery.left_behind import watch_replaced
from dynarank.surgery.optimizer_state import new_contents, write
from dynarank.surgery.own_references import is_optimizer, wrapped
from dynarank.surgery.pretrained import follow_pretrained, unfollow_pretrained
from dynarank.surgery.replaced import returning_states
from dynarank.surgery.settings import new_parameters
from dynarank.surgery.sites import survey
from dynarank.surgery.unfit import UnfitLayers
from dynarank.surgery.unfollowed import check_updates
from dynarank.surgery.wrappers import (
    check_unwrapped,
    is_wrapper,
    rebuild_wrappers,
    wrappers_that_follow,
)

__all__ = ["follow_loads", "forms_loaded", "loaded_since", "note_forms_loaded", "unfollow_loads"]

_LOADED: list[None] = []  # one for each load that has changed forms, of any model
_LAST_LOADED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # the last that changed it


def follow_loads(model: nn.Module) -> None:
    """From now on the model takes states of other forms; its copies do too."""
    follow_pretrained(model)
    if not _ours(_hooks(model)):
        model.register_load_state_dict_pre_hook(_before_load)


def unfollow_loads(model: nn.Module) -> None:
    """Take the hooks off the model and its modules."""
    unfollow_pretrained(model)
    for hooks in map(_hooks, model.modules()):
        for number in _ours(hooks):
            del hooks[number]


def forms_loaded() -> int:
    """How many loads have changed forms so far, of any model."""
    return len(_LOADED)


def loaded_since(count: int, model: nn.Module) -> bool:
    """Whether a load has changed forms of this model since there were so many of any model."""
    return count < len(_LOADED) and any(_LAST_LOADED.get(m, 0) > count for m in model.modules())


def note_forms_loaded(modules: Iterable[nn.Module]) -> None:
    """Count a load that has changed forms of these modules."""
    _LOADED.append(None)
    _LAST_LOADED.update(dict.fromkeys(modules, len(_LOADED)))


def _hooks(module: nn.Module) -> dict[int, Any]:
    return module._load_state_dict_pre_hooks  # pyright: ignore[reportPrivateUsage]


def _ours(hooks: Mapping[int, Any]) -> list[int]:
    return [number for number, one in hooks.items() if getattr(one, "hook", None) is _before_load]


@torch.no_grad()
def _before_load(
    model: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any
) -> None:
    """Bring the model to the forms of the part of ``state`` below ``prefix``."""
    load = Load.of(state, prefix, metadata)
    found = [one for site in survey(model) if (one := incoming(site, load)) is not None]
    plain = [one for one in found if one.becomes_full and not load.is_ours]
    _check_whole(found)
    edits = [_edit(one) for one in found if one.needs_edit and one not in plain]
    refactored = _refactored(plain)
    with torch.inference_mode(False):  # parameters made in inference mode could never train
        _commit(edits, [one for one in found if one.saved is not None])
    for one in found:
        forget(one.site.module)
    for one, values in zip(plain, refactored, strict=True):
        keep(one.site, one.tensors[one.site.spec.name].detach().clone())
        for path in one.paths:
            at = f"{load.key(path)}.".lstrip(".")
            del state[at + one.site.spec.name]
            state.update({at + name: value for name, value in values.items()})
    state.pop(prefix + KEY, None)  # the model's own; of its class when the load began


def _check_whole(found: Iterable[Incoming]) -> None:
    """Raise ValueError for sharded weights of another form: no process has all of their values."""
    if other := [one for one in found if one.site.sharding is not None and not one.same]:
        first = other[0]
        more = f" (and {len(other) - 1} others)" if len(other) > 1 else ""
        raise ValueError(
            f"layer {first.site.path!r}{more} is {first.after} in the state and {first.before} in "
            "the model, which is sharded by fully_shard: bring it to the state's forms first, in "
            "all processes, by RankScheduler(..., state=) or apply_plan"
        )


def _edit(one: Incoming) -> Edit:
    """The change that gives a weight the parameters that the state has."""
    site, change = one.site, Change(one.site.path, one.before, one.after, 0.0)
    if one.same:
        return Edit(site, change, {}, {})
    old = site.parameters()
    check_replaceable(site.path, old)
    check_names(site, one.after)
    # Factors of another dtype than their base, as fp32 adapters on a bf16 model, are meant so.
    mixed = len({tensor.dtype for tensor in one.tensors.values()}) > 1
    values = {
        name: like_old(tensor, name, site, one.after, tensor.dtype if mixed else None).clone()
        for name, tensor in one.tensors.items()
    }
    return Edit(site, change, old, new_parameters(site, values))


def _refactored(plain: Sequence[Incoming]) -> list[dict[str, Tensor]]:
    """The parameters of full-rank weights in the forms that their layers have."""
    unfit, errors, new = UnfitLayers(), dict[str, float](), list[dict[str, Tensor]]()
    for one in plain:
        layer, name = one.site.module, one.site.spec.name
        assert isinstance(layer, RankedLayer)
        weight, value = layer.resolved(name), one.tensors[name]
        own = {n: _writable(own_parameters(layer)[n], value) for n in weight.names}
        with unfit.layer(one.site.path):
            errors[one.site.path] = weight.write_(own, value)
            new.append(own)
    unfit.check()
    if errors:
        _warn_of_refactored(errors, any(isinstance(one.before, LowRank) for one in plain))
    return new


def _writable(parameter: Parameter | None, value: Tensor) -> Tensor:
    """A copy of the parameter; of one on the meta device, what no value could be taken for."""
    assert parameter is not None
    if not parameter.is_meta:
        return parameter.detach().clone()
    return torch.full_like(parameter, torch.nan, device=value.device)


def _warn_of_refactored(errors: Mapping[str, float], truncated: bool) -> None:
    worst = max(errors, key=lambda path: errors[path])
    how = "became the frozen bases of adapters with zero output"
    if truncated:
        how = (
            "were truncated to the ranks of the layers, with a relative error of up to "
            f"{errors[worst]:.2g} (at {worst!r})"
        )
    warnings.warn(
        f"the loaded state has full-rank weights for these factored layers, which {how}: "
        f"{', '.join(errors)}. To load them as they are, as a full-rank state of a ranked model is "
        "meant (safetensors keeps no metadata that says it), call dr.inflate(model) first, or load "
        "the rank scheduler's state before the next optimizer step",
        UserWarning,
        stacklevel=2,
    )


def _commit(edits: Sequence[Edit], saved: Iterable[Incoming]) -> None:
    """Change modules and the optimizers that hold their parameters, all or nothing."""
    replaced = [edit for edit in edits if edit.old]
    with one_scan():
        held = [(one, _held_by(one, replaced)) for one in _holders(replaced)]
        wrappers = wrappers_that_follow([edit.site for edit in replaced])
    contents = [new_contents(mine, [one], "reset") for one, mine in held]
    with ExitStack() as undo:
        undo.callback(rebuild_wrappers, wrappers, None)  # called last
        for edit in edits:
            edit.commit(undo)
        check_committed(edits, ())
        for (one, mine), new in zip(held, contents, strict=True):
            states = [(each.state, dict(each.state)) for each in wrapped(one)]
            write(new, undo)
            check_committed(mine, [one])
            if not isinstance(one, LBFGS):
                _keep_states(mine, states)
        write(returning_states(replaced), undo)
        for one in saved:
            for layer in (place.module for place in one.site.places):
                if isinstance(layer, RankedLayer) and one.saved is not None:
                    restore_on_exit(layer.__dict__, undo)
                    layer.adopt({one.site.spec.name: one.saved})
        rebuild_wrappers(wrappers, undo)
        undo.pop_all()
    if replaced:
        check_updates()
    if edits:
        note_forms_loaded(place.module for edit in edits for place in edit.site.places)
    watch_replaced(edits)


def _holders(edits: Sequence[Edit]) -> list[Any]:
    """The optimizers that hold parameters which are replaced: nobody has named them.

    Raises:
        ValueError: a wrapper that cannot follow holds them too.
    """
    if not edits:
        return []
    changed = {id(place.module) for edit in edits for place in edit.site.places}
    found: list[Any] = []
    for one in live(Optimizer, nn.Module):
        if is_optimizer(one) and _held_by(one, edits):
            found.append(one)
        elif is_wrapper(type(one)) and any(id(module) in changed for module in one.modules()):
            check_unwrapped(one)
    inner = {id(each) for one in found for each in wrapped(one)[1:]}
    outer = [one for one in found if id(one) not in inner]
    for edit in edits:
        _check_together(edit, outer)
    return outer


def _check_together(edit: Edit, optimizers: Iterable[Any]) -> None:
    """Raise ValueError if parameters of one weight are in different optimizers."""
    old = {id(p) for p in edit.old.values()}
    parts = [old & {id(p) for g in one.param_groups for p in g["params"]} for one in optimizers]
    if len({frozenset(part) for part in parts if part}) > 1:
        raise ValueError(
            f"layer {edit.site.path!r} is {edit.change.after} in the state, and its parameters "
            f"({', '.join(edit.old)}) are spread over several optimizers, which cannot be told "
            "where the new ones belong; leave them to one, which may have several groups"
        )


def _held_by(optimizer: Any, edits: Sequence[Edit]) -> list[Edit]:
    """Those of the edits whose old parameters are in the optimizer's groups."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [edit for edit in edits if any(id(p) in held for p in edit.old.values())]


def _keep_states(edits: Iterable[Edit], states: Iterable[tuple[Any, dict[Any, Any]]]) -> None:
    """Leave new parameters the states of old ones that fit: they may be of this very load."""
    new = {edit.old[n]: p for edit in edits for n, p in edit.new.items() if n in edit.old}
    for table, before in states:
        kept = {new.get(p, p): s for p, s in before.items() if p in table or _fits(s, p, new)}
        made = {p: state for p, state in table.items() if p not in kept}
        table.clear()
        table.update({**kept, **made})


def _fits(state: Any, old: Any, new: Mapping[Any, Parameter]) -> bool:
    if old not in new or not isinstance(state, dict):
        return False
    shaped = [v for v in state.values() if isinstance(v, Tensor) and v.ndim > 0]
    shape = new[old].shape
    return old.shape == shape or all(value.shape == shape for value in shaped)
