"""Adapters to and from PEFT: ``W + alpha / r * lora_B @ lora_A`` is an adapted layer.

``lora_A`` is ``down``, ``lora_B`` is ``up``, ``lora_alpha`` is alpha. Everything else is the base.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dynarank.checkpoint.save import said_if_alone
from dynarank.distributed.processes import independent, processes_of
from dynarank.distributed.unwrap import unwrapped
from dynarank.export.peft_config import Scaling, check_config, config_of, scaling_of
from dynarank.export.peft_folder import BASE, is_pretrained, read_adapter, write_adapter
from dynarank.export.peft_import import own_tensors, prepare_import
from dynarank.export.peft_layers import PREFIX, is_transposed, layer_obstacle, tensors_of
from dynarank.export.plain import check_copyable, copied
from dynarank.forms import Adapted, LowRank
from dynarank.layers import RankedLayer
from dynarank.surgery.edit import Edit, check_values_known
from dynarank.surgery.foreign_adapters import inside_adapters, is_adapter
from dynarank.surgery.loading import follow_loads
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.transaction import change_forms
from dynarank.surgery.verbs import merge
from dynarank.surgery.wrappers import check_unwrapped

__all__ = ["from_peft", "to_peft"]

_Model = TypeVar("_Model", bound=nn.Module)
_Adapter = tuple[Mapping[str, Any], dict[str, Tensor]]  # configuration, tensors


def to_peft(model: _Model, folder: str | Path, *, base: str | None = None) -> _Model:
    """Write a model's adapters as a PEFT folder, and return the base, a plain copy without them.

    ``PeftModel.from_pretrained(base, folder)`` then computes what the model computes. Needs no PEFT
    to be installed. Layers that are full-rank are part of the base.

    The folder gets ``adapter_config.json``, ``adapter_model.safetensors`` and ``base/``: what
    ``save_pretrained`` writes of a transformers model, of any other its state, as
    ``model.safetensors``. It is there whole or not at all; an earlier export is replaced.

    Of several processes that train the model, all call it, and the first writes.

    Args:
        model: with adapted layers (SVD), also inside ``torch.compile`` or DDP; it is left as it is.
        folder: where.
        base: the name or path of the base, if it is stored elsewhere already: no ``base/`` then.

    Returns:
        The base, on the model's devices.

    Raises:
        ValueError: the model has no adapted layers, or low-rank ones, or PEFT would compute
            something else than an adapted layer: convolutions with dilation or another padding
            than zeros, transposed convolutions, recurrent layers, attention in one module, modules
            in several places, sharded weights. Or the folder holds something else. Nothing has
            been written then.

    Example:
        >>> model = dr.deflate(nn.Sequential(nn.Linear(8, 8)), 2, layers="*")
        >>> base = dr.to_peft(model, getfixture("tmp_path") / "adapter")
        >>> base
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
        >>> dr.from_peft(base, getfixture("tmp_path") / "adapter")[0].form
        Adapted(rank=2, decomposition='svd', alpha=16.0)

    Reference:
        https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    check_unwrapped(model)
    core, target = unwrapped(model), Path(os.path.realpath(folder))
    processes = processes_of(*core.modules())
    with said_if_alone("dr.to_peft"):
        processes.agree("the folder to write", str(target))
    plain, tensors, layers = processes.attempt("an export to PEFT", lambda: _exported(core))
    name = base or (str(target / BASE) if is_pretrained(plain) else None)
    config = _config(layers, plain, name)
    written = plain if base is None else None
    processes.by_first(f"writing {target}", lambda: write_adapter(target, config, tensors, written))
    return plain


def from_peft(model: _Model, folder: str | Path | None = None) -> _Model:
    """Bring the layers of a PEFT LoRA adapter to the adapted form, with its values; in place.

    Each layer becomes ``Adapted(rank, alpha=alpha)``, and trains, inflates and merges like any
    other; the factors keep their dtype. What else the folder holds (``modules_to_save``, biases,
    embeddings) becomes the model's. Needs no PEFT to be installed. Make the optimizer afterwards.

    Args:
        model: the base that the adapter was trained on, also inside ``torch.compile`` or DDP. Or,
            without a folder, a live ``PeftModel``: a copy is changed, and it stays as it is.
        folder: what PEFT or :func:`to_peft` wrote.

    Returns:
        The model; of a live ``PeftModel`` a copy of its base.

    Raises:
        ValueError: the adapter is not plain LoRA (DoRA, PiSSA, another method), is of another
            model, or adapts layers that ours would compute differently; the message says which
            and the way out. Nothing has changed then.
        FileNotFoundError: there is no adapter in the folder.
        DamagedFileError: a file is damaged.

    Warns:
        UserWarning: the adapter was trained with dropout, which adapted layers do not have.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
        >>> peft_model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
        >>> dr.from_peft(peft_model)[0].form
        Adapted(rank=4, decomposition='svd', alpha=8.0)
    """
    if folder is None:
        model, adapter = _unloaded(model)
    else:
        adapter = None
    check_unwrapped(model)
    core = unwrapped(model)
    if inside_adapters(core):
        raise ValueError(
            "the model holds PEFT's own adapters (PeftModel changes its base in place): give a "
            "base without any, or take the live model over, dr.from_peft(peft_model)"
        )
    together = processes_of(*core.modules(), training=False)

    def prepare() -> tuple[list[Edit], dict[str, Tensor]]:
        config, tensors = read_adapter(Path(str(folder))) if adapter is None else adapter
        return prepare_import(core, config, tensors)

    with torch.inference_mode(False):  # parameters made in inference mode could never train
        edits, others = together.attempt("an import from PEFT", prepare)
        with ExitStack() as undo:
            own = own_tensors(core)
            for name, value in others.items():
                undo.callback(_copy, own[name], own[name].detach().clone())
                _copy(own[name], value)
            change_forms([], prepared=edits, undo=undo, together=together)
            undo.pop_all()
    follow_loads(core)
    return model


def _to_export(core: nn.Module) -> list[tuple[Site, Adapted]]:
    """The places of adapted weights.

    Raises:
        ValueError: there are none, or a weight has factors that PEFT has no place for.
    """
    if inside_adapters(core):
        raise ValueError(
            "the model holds PEFT's own adapters: its save_pretrained writes them, and "
            "dr.from_peft(model) makes them adapted layers"
        )
    places: list[tuple[Site, Adapted]] = []
    for site in survey(core):
        if site.form is None and _has_factors(site):
            raise ValueError(f"layer {site.path!r} cannot be exported: {site.obstacle}")
        if isinstance(site.form, LowRank):
            raise ValueError(
                f"layer {site.path!r} is {site.form}: PEFT adds adapters to full-size weights, and "
                f"it has none. Make it one, dr.inflate(model, layers={site.path!r}), or export the "
                "model as plain layers, dr.to_plain(model)"
            )
        if isinstance(site.form, Adapted):
            _check_exportable(core, site, site.form)
            places += [(place, site.form) for place in site.places]
    if not places:
        raise ValueError(
            "no layer of the model is adapted, so that PEFT has nothing to store: "
            'dr.deflate(model, to="adapted") adds adapters, dr.merge(model) gives plain layers'
        )
    return places


def _check_exportable(core: nn.Module, site: Site, form: Adapted) -> None:
    check_values_known(site.path, site.parameters())
    reason = "" if form.decomposition == "svd" else f"its adapter is a {form.decomposition} one"
    for place in site.places:
        reason = reason or layer_obstacle(site, place, core)
    if not reason:
        return
    out = f"merge it into the base, dr.inflate(model, layers={site.path!r})"
    if site.sharding is not None:
        out = "dr.save the model, and dr.load it into one that is not sharded"
    raise ValueError(f"layer {site.path!r} cannot be exported to PEFT: {reason}; {out}")


def _has_factors(site: Site) -> bool:
    return isinstance(site.module, RankedLayer) and site.module.has_factors(site.spec.name)


def _exported(core: nn.Module) -> tuple[Any, dict[str, Tensor], dict[str, Scaling]]:
    """A plain copy of the model, whose adapted weights are their bases, and what it had more.

    The paths are the copy's, which has no wrappers inside.
    """
    _to_export(core)  # refused before it is copied
    check_copyable(core)
    tensors, layers = dict[str, Tensor](), dict[str, Scaling]()
    with independent(), torch.inference_mode(False):
        plain = copied(core)
        for place, form in _to_export(plain):
            own, layers[place.path] = tensors_of(place, form)
            tensors |= {f"{PREFIX}{place.path}{key}": value for key, value in own.items()}
        for site in survey(plain):
            for factor in site.factors():
                factor.data = torch.zeros_like(factor)  # the exported one keeps its values
        return merge(plain), tensors, layers


def _config(layers: Mapping[str, Scaling], plain: nn.Module, base: str | None) -> dict[str, Any]:
    """PEFT's configuration; ``base``: the name or path of the base."""
    more: dict[str, Any] = {"base_model_name_or_path": base}
    more["fan_in_fan_out"] = any(map(is_transposed, map(plain.get_submodule, layers)))
    if is_pretrained(plain):  # for AutoPeftModel
        kind = {"base_model_class": type(plain).__name__, "parent_library": type(plain).__module__}
        more["auto_mapping"] = kind
    return config_of(layers, **more)


@torch.no_grad()
def _copy(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)


def _unloaded(model: Any) -> tuple[Any, _Adapter]:
    """A copy of the base of a live ``PeftModel``, and its adapter."""
    live = unwrapped(model)
    configs: Mapping[str, Any] | None = getattr(live, "peft_config", None)
    if configs is None or not callable(getattr(live, "get_base_model", None)):
        name = type(live).__name__
        raise TypeError(
            f"without a folder from_peft takes a PeftModel, got {name}: save the adapter "
            "(save_pretrained), and give the base and the folder"
        )
    if len(configs) != 1:
        raise ValueError(
            f"the PeftModel has {len(configs)} adapters ({', '.join(configs)}), one can be taken "
            "over: delete the others (delete_adapter)"
        )
    (name, one), *_ = configs.items()
    config = one.to_dict()
    check_config(config)
    for path, layer in live.named_modules():
        _check_live(path, layer, config, name)
    from peft import get_peft_model_state_dict

    copied: Any = copy.deepcopy(live)
    tensors = get_peft_model_state_dict(copied, adapter_name=name, save_embedding_layers=False)
    return copied.unload(), (config, tensors)


def _check_live(path: str, layer: Any, config: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if a layer of PEFT's computes something else than its configuration says."""
    if not is_adapter(layer):  # attention has a scaling of its own
        return
    if getattr(layer, "merged", False):
        raise ValueError(f"the adapter is merged into {path!r}: call unmerge_adapter() first")
    scale = getattr(layer, "scaling", {}).get(name)
    if scale is None:
        return
    rank, alpha = scaling_of(config, path.removeprefix(PREFIX))
    if not math.isclose(scale, alpha / rank):
        raise ValueError(
            f"{path!r} is scaled by {scale:g}, its configuration says {alpha / rank:g}: undo "
            "set_scale or scale_layer first"
        )
