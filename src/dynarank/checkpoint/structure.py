"""A model's structure as plain data: what tells which tensors it has, and what becomes of them.

That is the form of each weight that has or had factors, and what a later change of form looks up:
the form in which it last had factors, the factors that are frozen, the norms that its factors had
when a change made them. With every parameter's shape and dtype, and whether it trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from dynarank.checkpoint.folder import read_data
from dynarank.form_data import form_from_data, form_to_data
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers import RankedLayer
from dynarank.surgery.edit import restore_on_exit
from dynarank.surgery.restore import restore_forms
from dynarank.surgery.selection import find_sites
from dynarank.surgery.sites import survey

__all__ = ["restore_structure", "saved_plan", "structure_of"]


def structure_of(model: nn.Module) -> dict[str, Any]:
    """The structure of a model as plain data.

    Example:
        >>> model = dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> structure_of(model)["layers"]["0"]["form"]["rank"]
        2
    """
    sites = [site for site in survey(model) if site.form is not None]
    return {
        "layers": {
            site.path: {
                "form": form_to_data(site.form),
                "last": form_to_data(last) if (last := site.last_factored_form) else None,
                "frozen": sorted(site.frozen_factors),
                "norms": list(site.factor_norms),
            }
            for site in sites
            if site.form is not None and isinstance(site.module, RankedLayer)
        },
        "parameters": {
            name: {"shape": list(p.shape), "dtype": _dtype(p), "trains": p.requires_grad}
            for name, p in model.named_parameters()
        },
    }


def saved_plan(folder: str | Path) -> dict[str, Form]:
    """The forms of the model in a folder that :func:`dynarank.save` wrote, for ``apply_plan``.

    For what is to have them before it is loaded, such as a model before ``fully_shard``.

    Args:
        folder: the folder. Its structure is read, no tensor.

    Raises:
        FileNotFoundError: there is no such folder.
        DamagedFileError: its files are not as they were written; tensors are compared by size.

    Example:
        >>> folder = getfixture("tmp_path") / "last"
        >>> model = dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> saved_plan(dr.save(folder, model=model))
        {'0': LowRank(rank=2, decomposition='svd')}
    """
    layers = read_data(Path(folder), "structure")["model"]["layers"]
    return {path: form_from_data(one["form"]) for path, one in layers.items()}


def restore_structure(
    model: nn.Module, data: Mapping[str, Any], optimizers: Sequence[Optimizer], undo: ExitStack
) -> None:
    """Bring a model to a structure; the values of what changes are loaded afterwards.

    Args:
        model: any model with the same layers; weights that ``data`` does not name become full-rank.
        data: from :func:`structure_of`.
        optimizers: the model's; new parameters take the places of the old ones.
        undo: a stack that takes it all back.

    Raises:
        ValueError: the data is not a structure, or the model has other layers or parameters.
    """
    layers = cast(Mapping[str, Mapping[str, Any]], data["layers"])
    forms: dict[str, Form] = {
        site.path: FullRank() for site in survey(model) if isinstance(site.module, RankedLayer)
    }
    forms |= {path: form_from_data(one["form"]) for path, one in layers.items()}
    last = {path: form_from_data(one["last"]) for path, one in layers.items() if one["last"]}
    factored = {path: form for path, form in last.items() if isinstance(form, LowRank | Adapted)}
    restore_forms(model, forms, factored, list(optimizers), undo)
    for path, site in find_sites(model, survey(model), layers).items():
        for place in (place for place in site.places if isinstance(place.module, RankedLayer)):
            _recall(cast(RankedLayer, place.module), place.spec.name, layers[path], undo)
    _check(model, data["parameters"])
    for name, parameter in model.named_parameters():
        trains = bool(data["parameters"][name]["trains"])
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
        parameter.requires_grad_(trains)


def _recall(layer: RankedLayer, name: str, saved: Mapping[str, Any], undo: ExitStack) -> None:
    """Give a layer what it knew about a weight beside its form."""
    restore_on_exit(layer.__dict__, undo)
    layer.set_form(name, layer.forms[name], frozenset(saved["frozen"]), tuple(saved["norms"]))
    last = form_from_data(saved["last"]) if saved["last"] else None
    layer.remember(name, last if isinstance(last, LowRank | Adapted) else None)


def _check(model: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError unless the model has the parameters that were saved."""
    own = dict(model.named_parameters())
    if other := [*(own.keys() - saved.keys()), *(saved.keys() - own.keys())]:
        name = min(other)
        where = "the model" if name in own else "the checkpoint"
        raise ValueError(
            f"only {where} has the parameter {name!r} ({len(other)} differ): it was saved from "
            "another model; build the model as it was built then"
        )
    for name, p in own.items():
        now, then = (tuple(p.shape), _dtype(p)), (tuple(saved[name]["shape"]), saved[name]["dtype"])
        if now != then:
            raise ValueError(
                f"the parameter {name!r} is {now[1]} {now[0]} in the model and {then[1]} {then[0]} "
                "in the checkpoint; build the model as it was built then (and convert it to the "
                "dtype it had) before loading"
            )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
