"""The changes that bring a PEFT adapter into a model, all worked out before one is made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.export.peft_config import MERGE, check_config, dropout_of, scaling_of
from dynarank.export.peft_layers import PREFIX, adapter_keys, form_and_factors, layer_obstacle
from dynarank.files.printable import printable
from dynarank.forms import Change, FullRank
from dynarank.surgery.edit import Edit, check_names, check_replaceable, check_values_known
from dynarank.surgery.selection import find_sites
from dynarank.surgery.settings import new_parameters
from dynarank.surgery.sites import Site, survey

__all__ = ["own_tensors", "prepare_import"]


def prepare_import(
    core: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[list[Edit], dict[str, Tensor]]:
    """The changes of the adapted layers, and other tensors that become the model's.

    Raises:
        ValueError: the adapter is of another kind, or of another model.
    """
    check_config(config)
    found, others = _by_layer(tensors)
    if not found:
        raise ValueError(f"the adapter has no lora_A, only {', '.join(others) or 'nothing'}")
    modules = dict(core.named_modules())
    for path in found:
        if isinstance(modules.get(path), nn.MultiheadAttention):
            raise ValueError(
                f"the adapter adapts {path!r}, whose weights PEFT adapts in a way of its own (an "
                f"nn.MultiheadAttention): {MERGE}"
            )
    sites = find_sites(core, survey(core), found)
    edits: dict[int, Edit] = {}
    for path, site in sites.items():
        try:
            if id(site) not in edits:
                edits[id(site)] = _edit(core, site, config, found)
        except ValueError as error:
            raise ValueError(f"layer {path!r} cannot take its adapter: {error}") from None
    fitting = _fitting(core, others)
    if (dropout := dropout_of(config)) > 0:
        warnings.warn(
            f"the adapter was trained with lora_dropout={dropout}, and adapted layers have none: "
            "its outputs are those of eval mode, and it trains on without",
            UserWarning,
            stacklevel=5,
        )
    return list(edits.values()), fitting


def _by_layer(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each adapted layer by the ends of their names, and others by theirs."""
    ends = (*adapter_keys(False), *adapter_keys(True))
    found, others = dict[str, dict[str, Tensor]](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            others[name] = tensor
        else:
            found.setdefault(name.removesuffix(end), {})[end] = tensor
    return found, others


def _edit(
    core: nn.Module,
    site: Site,
    config: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Tensor]],
) -> Edit:
    """The change that gives a weight the adapter that PEFT has of it."""
    old = site.parameters()
    if not isinstance(site.form, FullRank):
        raise ValueError(f"it is {site.form} already: dr.inflate(model) makes it a base")
    if site.sharding is not None:
        raise ValueError("it is sharded by fully_shard: call dr.from_peft before that")
    check_values_known(site.path, old)
    check_replaceable(site.path, old)
    for place in site.places:
        if reason := layer_obstacle(site, place, core):
            raise ValueError(f"{reason}: {MERGE}")
        if place.path not in found:
            raise ValueError(
                f"it is tied to {place.path!r}, which has no adapter in PEFT: untie the two, each "
                "with a weight of its own, before from_peft"
            )
    rows = [
        form_and_factors(place.spec, found[place.path], scaling_of(config, place.path))
        for place in site.places
    ]
    form, pair = rows[0]
    if any(f != form or not all(map(torch.equal, pair, other)) for f, other in rows[1:]):
        places = " and ".join(repr(place.path) for place in site.places)
        raise ValueError(f"{places} are one weight with adapters that differ: untie it before")
    check_names(site, form)
    base = next(iter(old.values())).detach()
    factors = (factor.detach().to(base.device, copy=True) for factor in pair)
    names = site.spec.parameter_names(form)
    new = new_parameters(site, dict(zip(names, (base, *factors), strict=True)))
    for name in names[1:]:
        new[name].requires_grad_(True)
    return Edit(site, Change(site.path, site.form, form, 0.0), old, new)


def _fitting(core: nn.Module, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are no adapter's, by the names that they have in the model.

    Raises:
        ValueError: the model has none of this name and shape.
    """
    own, fitting = own_tensors(core), dict[str, Tensor]()
    for given, value in others.items():
        name = given if given in own else given.replace(".base_layer.", ".")
        if name not in own:
            raise ValueError(f"the adapter has a tensor {printable(given)!r}, the model has none")
        if own[name].shape != value.shape:
            raise ValueError(
                f"the adapter's {printable(name)!r} is {tuple(value.shape)}, the model's is "
                f"{tuple(own[name].shape)}: give the model that it was trained on"
            )
        fitting[name] = value
    return fitting


def own_tensors(core: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    buffers = core.named_buffers(remove_duplicate=False)
    return {**dict(core.named_parameters(remove_duplicate=False)), **dict(buffers)}
