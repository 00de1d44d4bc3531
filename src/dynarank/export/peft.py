"""Adapters to and from PEFT: ``W + alpha / r * lora_B @ lora_A`` is an adapted layer.

``lora_A`` is ``down``, ``lora_B`` is ``up``, ``lora_alpha`` is alpha. Everything else is the base.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dynarank.checkpoint.folder import put_in_place, settle
from dynarank.checkpoint.save import said_if_alone
from dynarank.distributed.processes import independent, processes_of
from dynarank.distributed.unwrap import unwrapped
from dynarank.export.peft_config import MERGE, check_config, config_of, dropout_of, scaling_of
from dynarank.export.peft_layers import (
    adapter_keys,
    form_and_factors,
    is_transposed,
    layer_obstacle,
    tensors_of,
)
from dynarank.export.plain import check_copyable, copied
from dynarank.files.atomic import temporary_beside, write_text
from dynarank.files.json_data import read_json
from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError
from dynarank.files.tensors import TensorFile, load_tensors, save_tensors
from dynarank.forms import Adapted, Change, FullRank, LowRank
from dynarank.layers import RankedLayer
from dynarank.surgery.edit import Edit, check_names, check_replaceable, check_values_known
from dynarank.surgery.loading import follow_loads
from dynarank.surgery.selection import find_sites
from dynarank.surgery.settings import new_parameters
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.transaction import change_forms
from dynarank.surgery.verbs import merge
from dynarank.surgery.wrappers import check_unwrapped

__all__ = ["from_peft", "to_peft"]

_Model = TypeVar("_Model", bound=nn.Module)
_CONFIG, _TENSORS, _BASE = "adapter_config.json", "adapter_model.safetensors", "base"
_PREFIX = "base_model.model."
_FILES = "files"  # in the header of the tensors: what else was written
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
    places = processes.attempt("an export to PEFT", lambda: _to_export(core))
    plain = processes.attempt("an export to PEFT", lambda: _without_adapters(core))
    processes.by_first(f"writing {target}", lambda: _write(target, places, plain, base))
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
    together = processes_of(*core.modules(), training=False)

    def prepare() -> tuple[list[Edit], dict[str, Tensor]]:
        config, tensors = _read(Path(str(folder))) if adapter is None else adapter
        return _prepared(core, config, tensors)

    with torch.inference_mode(False):  # parameters made in inference mode could never train
        edits, others = together.attempt("an import from PEFT", prepare)
        with ExitStack() as undo:
            own = _own(core)
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


def _without_adapters(core: nn.Module) -> Any:
    """A plain copy of the model, whose adapted weights are their bases."""
    check_copyable(core)
    with independent(), torch.inference_mode(False):
        base = copied(core)
        for site in survey(base):
            for factor in site.factors():
                factor.data.zero_()
        return merge(base)


def _write(
    folder: Path, places: list[tuple[Site, Adapted]], plain: nn.Module, base: str | None
) -> None:
    """Write the whole folder beside its place, then put it there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    settle(folder)
    _check_ours(folder)
    tensors, layers = dict[str, Tensor](), dict[str, tuple[int, float]]()
    for place, form in places:
        own, layers[place.path] = tensors_of(place, form)
        tensors |= {f"{_PREFIX}{place.path}{key}": value for key, value in own.items()}
    of_transformers = callable(getattr(plain, "save_pretrained", None))
    more: dict[str, Any] = {"base_model_name_or_path": base}
    if of_transformers:
        kind = type(plain)
        more["auto_mapping"] = {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
        }
        more["base_model_name_or_path"] = base or str(folder / _BASE)
    fan_in = any(is_transposed(place) for place, _ in places)
    config = config_of(layers, fan_in_fan_out=fan_in, **more)
    with temporary_beside(folder) as beside:
        beside.mkdir()
        if base is None:
            _write_base(plain, beside / _BASE, of_transformers)
        write_text(beside / _CONFIG, json.dumps(config, indent=2) + "\n")
        files = json.dumps(_files(beside))
        save_tensors(beside / _TENSORS, tensors, {"format": "pt", _FILES: files})
        if not put_in_place(beside, folder, sync=True):  # a volume that cannot rename folders
            shutil.copytree(beside, folder)


def _write_base(plain: Any, folder: Path, of_transformers: bool) -> None:
    if of_transformers:
        plain.save_pretrained(folder)
        return
    folder.mkdir()
    state = {name: value for name, value in plain.state_dict().items() if _is_tensor(name, value)}
    save_tensors(folder / "model.safetensors", state, {"format": "pt"})


def _is_tensor(name: str, value: object) -> bool:
    if isinstance(value, Tensor):
        return True
    raise ValueError(
        f"the state of the base has {name!r}, a {type(value).__name__} and no tensor: save the "
        'base yourself, and give its path, dr.to_peft(model, folder, base="path")'
    )


def _check_ours(folder: Path) -> None:
    """Raise ValueError if a folder holds anything but an earlier export."""
    if not folder.exists():
        return
    foreign = _files(folder) if folder.is_dir() else [folder.name]
    if foreign and folder.is_dir():
        try:
            known = TensorFile(folder / _TENSORS).metadata.get(_FILES)
            foreign = sorted(
                {*foreign} - {_TENSORS, *json.loads(known or "[]")} if known else foreign
            )
        except (FileNotFoundError, ValueError):
            pass
    if foreign:
        raise ValueError(
            f"{folder} holds something else than an export of dr.to_peft "
            f"({printable(foreign[0])}): nothing was written; give a new folder, or move it away"
        )


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def _read(folder: Path) -> _Adapter:
    """The configuration and tensors of a folder."""
    if not (folder / _TENSORS).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder} holds its tensors as adapter_model.bin, which is a pickle and is not read: "
            "let PEFT load and save it again (save_pretrained writes safetensors)"
        )
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict):
        raise DamagedFileError(folder / _CONFIG, "it is not a JSON object")
    return config, load_tensors(folder / _TENSORS)


def _prepared(
    core: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[list[Edit], dict[str, Tensor]]:
    """The changes of the adapted layers, and other tensors that become the model's.

    Raises:
        ValueError: the adapter is of another kind, or of another model.
    """
    _check(config)
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
            stacklevel=4,
        )
    return list(edits.values()), fitting


def _by_layer(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each adapted layer by the ends of their names, and others by theirs."""
    ends = (*adapter_keys(False), *adapter_keys(True))
    found, others = dict[str, dict[str, Tensor]](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
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
    own, fitting = _own(core), dict[str, Tensor]()
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


def _own(core: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    buffers = core.named_buffers(remove_duplicate=False)
    return {**dict(core.named_parameters(remove_duplicate=False)), **dict(buffers)}


@torch.no_grad()
def _copy(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)


def _unloaded(model: Any) -> tuple[Any, _Adapter]:
    """A copy of the base of a live ``PeftModel``, and its adapter."""
    live = unwrapped(model)
    configs: Mapping[str, Any] | None = getattr(live, "peft_config", None)
    if configs is None or not callable(getattr(live, "get_base_model", None)):
        name = type(live).__name__
        raise TypeError(f"without a folder from_peft takes a PeftModel, got {name}: give a folder")
    if len(configs) != 1:
        raise ValueError(
            f"the PeftModel has {len(configs)} adapters ({', '.join(configs)}), one can be taken "
            "over: delete the others (delete_adapter)"
        )
    (name, one), *_ = configs.items()
    config = one.to_dict()
    _check(config)
    for path, layer in live.named_modules():
        _check_live(path, layer, config, name)
    from peft import get_peft_model_state_dict

    copied: Any = copy.deepcopy(live)
    tensors = get_peft_model_state_dict(copied, adapter_name=name, save_embedding_layers=False)
    return copied.unload(), (config, tensors)


def _check_live(path: str, layer: Any, config: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if a layer of PEFT's computes something else than its configuration says."""
    if getattr(layer, "merged", False):
        raise ValueError(f"the adapter is merged into {path!r}: call unmerge_adapter() first")
    scale = getattr(layer, "scaling", {}).get(name)
    if scale is None:
        return
    rank, alpha = scaling_of(config, path.removeprefix(_PREFIX))
    if not math.isclose(scale, alpha / rank):
        raise ValueError(
            f"{path!r} is scaled by {scale:g}, its configuration says {alpha / rank:g}: undo "
            "set_scale or scale_layer first"
        )


def _check(config: Mapping[str, Any]) -> None:
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"the adapter cannot be taken over: {error}") from None
