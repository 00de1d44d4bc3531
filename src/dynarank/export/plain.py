"""A trained model as ordinary torch modules, its factors kept: it runs without dynarank."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from dynarank.cost.stand_in import without_graphs
from dynarank.distributed.dtensors import is_dtensor
from dynarank.distributed.processes import independent
from dynarank.distributed.unwrap import inside, unwrapped
from dynarank.export.readers import attributes, close_fast_paths, weights_read
from dynarank.export.same_outputs import check_same
from dynarank.forms import FullRank, LowRank
from dynarank.layers import RankedLayer, readers
from dynarank.surgery.loading import unfollow_loads
from dynarank.surgery.selection import LayerFilter, why_left
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.verbs import apply_plan

__all__ = ["Keep", "check_copyable", "copied", "to_plain"]

Keep: TypeAlias = Literal["cheaper", "factors", "merged"]
_Chains: TypeAlias = dict[nn.Module, nn.Module]

_HOOKS = ("_forward_", "_backward_", "_is_full_backward_hook")  # what a module keeps of its calls
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
                "_load_state_dict_post_hooks")  # fmt: skip
_TIED = "_tied_weights_keys"  # of transformers, given back with the plain layers
_LEFT_OUT = object()  # in a copy, in place of what is dynarank's


def to_plain(
    model: nn.Module,
    *,
    keep: Keep = "cheaper",
    layers: LayerFilter = None,
    example: Any = None,
) -> nn.Module:
    """A copy of a model that is made of ordinary torch modules and computes the same.

    A low-rank layer becomes its factors in a row, ``Sequential(Linear, Linear)`` or
    ``Sequential(Conv2d, Conv2d)``, the last with the bias; keys of its state are ``fc.0.weight``,
    ``fc.1.weight``, ``fc.1.bias``, and it tells its ``rank`` and ``decomposition``. An adapted
    layer is merged, and one that is full-rank is a plain layer again. So the result runs, copies,
    pickles and exports without dynarank.

    It is a copy that shares nothing with the model, which can go on training: its optimizer, hooks
    and :class:`RankScheduler` stay as they are. (:func:`merge` works in place.) Attributes that are
    objects of dynarank, such as a scheduler, are None in the copy.

    Args:
        model: any model, wrapped or not (the copy has no wrapper), in any mode.
        keep: ``"cheaper"`` keeps factors that have fewer entries than their weight, so that the
            result is never larger than a merged model; ``"factors"`` keeps all; ``"merged"`` none.
        layers: which low-rank layers may keep their factors, as for :func:`factorize`; None: all.
        example: a batch on which both models are compared, in evaluation mode: a tensor, a tuple
            of positional or a dict of keyword arguments. None: nothing is run.

    Raises:
        ValueError: a layer cannot become a plain one, is sharded, or, with an ``example``, the
            models differ, by the layer's name. The model is as it was.

    Warns:
        UserWarning: low-rank layers that had to be merged (attention's joint projection, recurrent
            layers, layers whose weight a parent reads), or a tie that is kept in part.

    Example:
        >>> model = dr.factorize(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), 8)
        >>> to_plain(model)[0]
        Sequential(
          (0): Linear(in_features=64, out_features=8, bias=False)
          (1): Linear(in_features=8, out_features=64, bias=True)
        )
    """
    if keep not in get_args(Keep):
        raise ValueError(f"keep is one of {', '.join(map(repr, get_args(Keep)))}, got {keep!r}")
    core = unwrapped(model)
    check_copyable(core)
    told: list[str] = []
    with independent(), torch.inference_mode(False):  # gradients on: views of factors train
        plain = copied(core)
        sites = survey(plain)
        chains = _chains(plain, sites, keep, layers, told)
        _merge(plain, sites, chains)
        told += close_fast_paths(plain, chains)
        for layer, chain in chains.items():
            _become(layer, chain)
    for line in told:
        warnings.warn(line, UserWarning, stacklevel=2)
    if example is not None:
        check_same(core, plain, example)
    return plain


def check_copyable(core: nn.Module) -> None:
    """Raise ValueError for what a copy of the model would not follow."""
    for path, module in core.named_modules():
        own = vars(module).get("forward")
        compiled = inside(module) is not None  # made again in a copy, and taken off there
        if isinstance(own, FunctionType) and own.__closure__ and not compiled:
            raise ValueError(
                f"{path or 'the model'!r} has its own forward ({own.__name__}, set on the module "
                "itself), a function that a copy would share with this model: remove it first "
                "(`del module.forward`; accelerate: remove_hook_from_module), or dr.merge(model)"
            )
    for name, p in core.named_parameters():
        if is_dtensor(p):
            raise ValueError(
                f"{name} is sharded over several processes: save the model (dr.save), load it into "
                "one process, and make that one plain"
            )


def _chains(
    plain: nn.Module, sites: Sequence[Site], keep: Keep, layers: LayerFilter, told: list[str]
) -> _Chains:
    """The layers that keep their factors, each with the modules that replace it."""
    _check_able(sites)
    wanted = [one for one in sites if isinstance(one.form, LowRank)] if keep != "merged" else []
    if layers is not None:
        left = dict(zip(map(id, sites), why_left(sites, layers), strict=True))
        wanted = [site for site in wanted if not left[id(site)]]
    modules = list(dict.fromkeys(place.module for one in wanted for place in one.places))
    reasons, chains = _obstacles(plain, modules), _Chains()
    for module in modules:
        assert isinstance(module, RankedLayer)
        chain = None if reasons.get(module) else module.plain_chain()
        if chain is not None and _entries(chain) == _entries(module):
            chains[module] = chain
        else:
            reasons.setdefault(module, f"{_name(module)} has no plain form with factors")
    for site in wanted:
        _share(site, chains)
    lost: dict[str, list[str]] = {}
    for site in wanted:
        whole, places = math.prod(site.shape), [place.module for place in site.places]
        if why := next((reasons[m] for m in places if reasons.get(m)), ""):
            if keep == "factors" or site.entries() < whole:
                lost.setdefault(why, []).append(site.path)
        elif keep == "factors" or _factor_entries(site, chains) < whole:
            continue
        for module in places:
            reasons.setdefault(module, "another of its weights is merged")
            chains.pop(module, None)
    if lost:
        listed = "; ".join(f"{', '.join(paths)} ({why})" for why, paths in lost.items())
        told.append(f"these low-rank weights are merged, at their full size: {listed}")
    told += [line for site in wanted if site.module in chains for line in _tie_told(site, chains)]
    return chains


def _share(site: Site, chains: _Chains) -> None:
    """Tie what the chains at several places of a weight have made of one factor in the same way."""
    trained = {id(p) for place in site.places for p in place.module.parameters()}
    first: dict[tuple[type, str], nn.Parameter] = {}
    for place in site.places:
        chain = chains.get(place.module, nn.Identity())
        for name, p in list(chain.named_parameters()):
            same = p if id(p) in trained else first.setdefault((type(place.module), name), p)
            path, _, leaf = name.rpartition(".")
            setattr(chain.get_submodule(path), leaf, same)


def _check_able(sites: Sequence[Site]) -> None:
    """Raise ValueError for a weight with factors that nothing can be done with."""
    for site in sites:
        layer = site.module
        if site.form is None and isinstance(layer, RankedLayer):
            if layer.has_factors(site.spec.name):
                raise ValueError(f"layer {site.path!r} cannot become plain: {site.obstacle}")


def _obstacles(plain: nn.Module, modules: Sequence[nn.Module]) -> dict[nn.Module, str]:
    """Why low-rank layers have to be merged: who else uses their weights."""
    found = {m: f"{_name(r)} reads its weight" for m, r in readers(plain).items()}
    found |= weights_read(plain, modules)
    for module in modules:
        assert isinstance(module, RankedLayer)
        if any(not isinstance(form, LowRank) for form in module.forms.values()):
            found[module] = "its weights are in several forms"
        elif "forward" in vars(module):
            found[module] = "it has its own forward"
        elif any(vars(module)[name] for name in _STATE_HOOKS):
            found[module] = "hooks on its state know the names of its parameters"
        elif reason := type(module).unsupported_reason(module):
            found[module] = reason
    return found


def _name(module: nn.Module) -> str:
    return (module.plain if isinstance(module, RankedLayer) else type(module)).__name__


def _entries(module: nn.Module) -> list[int]:
    """The sizes of a module's tensors."""
    return sorted(t.numel() for t in (*module.parameters(), *module.buffers()))


def _factor_entries(site: Site, chains: _Chains) -> int:
    """The entries of the factors in the chains of a weight, shared ones once."""
    modules = [place.module for place in site.places]
    own = {id(p) for p in site.parameters().values()}
    others = {id(p) for m in modules for p in m.parameters() if id(p) not in own}
    kept = {id(p): p.numel() for m in modules for p in chains[m].parameters()}
    return sum(size for key, size in kept.items() if key not in others)


def _tie_told(site: Site, chains: _Chains) -> list[str]:
    """What to say of a tied weight whose plain forms cannot share every factor."""
    if _factor_entries(site, chains) == site.entries():
        return []
    paths = " and ".join(path for place in site.places for path in place.paths[:1])
    return [
        f"{paths} are one low-rank weight: they still share its last factor, and each has the "
        "others of its own, since one looks rows up and the other multiplies"
    ]


def _merge(plain: nn.Module, sites: Sequence[Site], chains: _Chains) -> None:
    """Make every ranked layer that does not keep its factors a plain one, in place."""
    due = [
        site.path
        for site in sites
        if isinstance(layer := site.module, RankedLayer)
        and layer not in chains
        and layer.has_factors(site.spec.name)
    ]
    apply_plan(plain, dict.fromkeys(due, FullRank()))
    unfollow_loads(plain)
    for layer in list(plain.modules()):
        if isinstance(layer, RankedLayer) and layer not in chains:
            layer.to_plain()


def _become(layer: nn.Module, chain: nn.Module) -> None:
    """Make a layer the chain, in place: whoever holds the layer holds the chain."""
    assert isinstance(layer, RankedLayer)
    chain.train(layer.training)
    own, form = vars(layer), next(iter(layer.forms.values()))
    assert isinstance(form, LowRank)
    kept = attributes(layer) | {n: value for n, value in own.items() if n.startswith(_HOOKS)}
    object.__setattr__(layer, "__class__", type(chain))
    own.clear()
    own.update(vars(chain) | kept | {"rank": form.rank, "decomposition": form.decomposition})


def copied(core: nn.Module) -> nn.Module:
    """A copy without wrappers, and without the hooks and objects of dynarank on its modules."""
    memo = without_graphs(core)
    for module in core.modules():
        memo |= {id(value): _LEFT_OUT for value in _own_objects(module)}
    plain = copy.deepcopy(core, memo)
    for module in plain.modules():
        own = vars(module)
        own.update({name: None for name, value in own.items() if value is _LEFT_OUT})
        for table in _hook_tables(module):
            for key in [key for key, hook in table.items() if hook is _LEFT_OUT]:
                del table[key]
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if inside(child) is not None:
                setattr(module, name, unwrapped(child))
    return plain


def _own_objects(module: nn.Module) -> Iterator[Any]:
    """The hooks of dynarank on a module, and the objects of dynarank among its attributes."""
    for table in _hook_tables(module):
        yield from (one for one in table.values() if _is_ours(getattr(one, "hook", one)))
    if not _is_ours(type(module)) and not isinstance(module, RankedLayer):
        own = (value for name, value in vars(module).items() if name != _TIED)
        yield from (value for value in own if _is_ours(type(value)))


def _hook_tables(module: nn.Module) -> list[dict[Any, Any]]:
    return [v for n, v in vars(module).items() if n.endswith("_hooks") and isinstance(v, dict)]


def _is_ours(value: Any) -> bool:
    return str(getattr(value, "__module__", None)).partition(".")[0] == "dynarank"
