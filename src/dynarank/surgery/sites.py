"""The traversal of a model: which weights can change form, which cannot, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dynarank.distributed.fsdp2 import Sharding, shardings
from dynarank.distributed.unwrap import unwrapped
from dynarank.forms import Form, FullRank, RankLike
from dynarank.layers import (
    RankedLayer,
    WeightSpec,
    class_obstacle,
    own_parameters,
    ranked_class,
    readers,
)
from dynarank.layers.obstacles import number_obstacle, weight_obstacle
from dynarank.surgery.defaults import with_defaults
from dynarank.surgery.foreign_adapters import inside_adapters, without_form
from dynarank.surgery.selection import LayerFilter, RankMap
from dynarank.surgery.site import Site
from dynarank.surgery.survey_table import Survey

__all__ = ["Site", "current_plan", "survey"]

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
# The extent and path of every parameter and buffer, by the memory that it is in.
_Owners = dict[object, list[tuple[int, int, str]]]


def survey(
    model: nn.Module,
    rank: RankLike | RankMap | None = None,
    *,
    layers: LayerFilter = None,
    decomposition: str = "svd",
) -> Survey:
    """Every weight of two or more dimensions that a module of the model owns, in order.

    A weight that several modules share is listed once, at its first place. The list prints as a
    table: each weight's form, with its parameters and FLOPs against full rank, or the reason why
    it is left. With a rank the forms are those that ``factorize`` would give; nothing is changed.

    Args:
        model: any model, wrapped or not; paths are those without wrappers.
        rank: the rank to show; None: the forms that the weights have.
        layers: see :func:`dynarank.factorize`; used with ``rank``.
        decomposition: see :func:`dynarank.factorize`; used with ``rank``.

    Example:
        >>> survey(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), rank=16)
        layer                            weight         form            params   FLOPs
        0                                128x64         low-rank 16     0.375x  0.375x
        2                                10x128         last linear: taken as output
        1 of 2 weights: 0.375x of 8,192 parameters
        the model: 0.467x of 9,610 parameters
    """
    model = unwrapped(model)
    sites = _traverse(model)
    return Survey(with_defaults(model, sites), model, rank, layers, decomposition)


def _traverse(model: nn.Module) -> list[Site]:
    modules: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, parametrize.ParametrizationList):
            modules.setdefault(module, []).append(path)
    owners, shards = _Owners(), shardings(model)
    for module, paths in modules.items():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            if not is_lazy(tensor):
                path, shard = f"{paths[0]}.{name}".lstrip("."), shards.get(id(tensor), (tensor,))[0]
                for one in (tensor,) if shard is tensor else (tensor, shard):
                    memory, start, end = _extent(one)
                    owners.setdefault(memory, []).append((start, end, path))
    parents, together = readers(model), dict[object, list[Site]]()
    foreign = inside_adapters(model)
    for module, paths in modules.items():
        for site in _sites(module, tuple(paths), parents.get(module), shards):
            if module in foreign:
                site = without_form(site, foreign[module])
            together.setdefault(_tie_key(site), []).append(site)
    return [one for group in together.values() for one in _tied(group, owners)]


def current_plan(model: nn.Module) -> dict[str, Form]:
    """The form of every weight that can change form: the plan that would change nothing.

    Example:
        >>> current_plan(nn.Sequential(nn.Linear(4, 2)))
        {'0': FullRank()}
    """
    return {site.path: site.form for site in survey(model) if site.form is not None}


def _sites(
    module: nn.Module,
    paths: tuple[str, ...],
    reader: nn.Module | None,
    shards: Mapping[int, tuple[Parameter, Any]],
) -> list[Site]:
    """The weights of one module."""
    kind = parametrize.type_before_parametrizations(module)
    ranked, own = ranked_class(kind), list(module.parameters(recurse=False))
    if kind.__module__.startswith(_QUANTIZED):
        reason = "its weight is quantized"
        return [_unable(module, paths, reason)] if hasattr(module, "weight") else []
    if any(map(is_lazy, own)):
        return [_unable(module, paths, "it is lazy: it has no shape before its first use")]
    if not any(p.ndim > 1 for p in own) and not (ranked and parametrize.is_parametrized(module)):
        return []
    if ranked is None:
        named = [(n, p) for n, p in module.named_parameters(recurse=False) if p.ndim > 1]
        return [_unable(module, paths, class_obstacle(kind), n, p.shape) for n, p in named]
    forms = module.forms if isinstance(module, RankedLayer) else {}
    found: list[Site] = []
    for spec in ranked.weights_of(module):
        form = forms.get(spec.name, FullRank())
        first = own_parameters(module).get(spec.parameter_names(form)[0])
        sharding = Sharding(module, shards[id(first)][1]) if id(first) in shards else None
        unsupported = ranked.unsupported_reason(module)
        reason = unsupported or weight_obstacle(module, spec, form, reader, sharding)
        left = number_obstacle(module, spec, form)
        known, refused = None if left or reason else form, not left and bool(reason)
        site = Site(module, paths, spec, known, left or reason, refused, reader=reader)
        found.append(replace(site, sharding=sharding))
    return found


def _unable(
    module: nn.Module,
    paths: tuple[str, ...],
    reason: str,
    name: str = "weight",
    shape: Sequence[int] = (),
) -> Site:
    """A weight of a module whose weights cannot change form."""
    return Site(module, paths, WeightSpec(name, tuple(shape)), None, reason)


def _tie_key(site: Site) -> object:
    """Equal for weights that are the same objects and are used as the same matrix."""
    if site.form is None:
        return object()
    ids = tuple(id(p) for p in site.parameters().values())
    return ids, replace(site.spec, lookup=False), site.form


def _tied(group: list[Site], owners: _Owners) -> list[Site]:
    """One site for all places of a weight; all refused if it is tied to something else too."""
    first, *others = group
    if first.form is None:
        return group
    covered = {f"{s.module_paths[0]}.{n}".lstrip(".") for s in group for n in s.parameters()}
    for name, p in first.parameters().items():
        if foreign := [path for path in _sharing(p, owners) if path not in covered]:
            obstacle = f"its {name} is tied to {', '.join(foreign)}"
            return [replace(s, form=None, obstacle=obstacle, refused=True) for s in group]
    bias = own_parameters(first.module).get("bias")
    shared = () if bias is None else _sharing(bias, owners)
    own = f"{first.module_paths[0]}.bias".lstrip(".")
    return [
        replace(first, tied=tuple(others), bias_shared_with=tuple(o for o in shared if o != own))
    ]


def _sharing(tensor: Tensor, owners: _Owners) -> list[str]:
    """The paths of the parameters and buffers in the memory of this one, its own included."""
    memory, start, end = _extent(tensor)
    return [path for low, high, path in owners.get(memory, ()) if low < end and start < high]


def _extent(tensor: Tensor) -> tuple[object, int, int]:
    """The memory that a tensor is in, and where: two that overlap are tied, as views are."""
    plain = type(tensor.data) is Tensor and tensor.layout is torch.strided and not tensor.is_meta
    if not plain or tensor.numel() == 0:
        return id(tensor), 0, 1
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps)
    start = tensor.data_ptr()
    return tensor.untyped_storage().data_ptr(), start, start + span * tensor.element_size()
