"""Weights that files keep as factors: low-rank layers, adapted layers, LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from dynarank.decompositions import (
    Decomposition,
    decomposition_names,
    get_decomposition,
    precise,
)
from dynarank.files.printable import printable
from dynarank.forms import Adapted
from dynarank.layers.form_entry import KEY, from_tensor
from dynarank.monitors.stored_weight import Claim, StoredWeight, as_layer
from dynarank.monitors.weight_files import WeightFiles

__all__ = ["factor_chain", "lora_update"]

_MOST_JOINED = 1 << 28  # values, 2 GiB in fp64: factors of a few bytes can multiply to terabytes
_ROWS = 1 << 20  # values
_LORA = re.compile(r"(.*)\.(lora_A|lora_embedding_A|lora_down)((?:\.\w+)?)((?:\.weight)?)")
_OTHER_FACTOR = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B", "lora_down": "lora_up"}


def factor_chain(files: WeightFiles, down: str) -> Claim | None:
    """The low-rank or adapted weight whose first factor this is.

    A chain beside an ``X.base`` is an adapter: it is added to it with the scale that the file's
    entry ``saved_forms`` tells. Without this entry they stay tensors of their own.
    """
    match = re.fullmatch(r"(.*[._])?down", down)
    if match is None or not 0 <= len(files.stored(down).shape) - 2 <= 3:
        return None
    stem = match[1] or ""
    form = _saved_form(files, stem)
    base = f"{stem}base"
    if base in files.homes and not isinstance(form, Adapted):
        return None
    names = decomposition_names() if form is None else (form.decomposition,)
    found = _chain(files, stem, down, names)
    if found is None or base not in files.homes:
        return found and Claim((found,), found.tensors)
    return _adapted(files, found, base, cast(Adapted, form))


def _saved_form(files: WeightFiles, stem: str) -> Any:
    """What the file says of the form of the weight whose parameter names begin with ``stem``."""
    layer, _, prefix = stem.rpartition(".")
    entry = f"{layer}.{KEY}" if layer else KEY
    if entry not in files.homes:
        return None
    try:
        forms = from_tensor(files.read(entry))
    except ValueError:
        return None
    saved = forms.get(prefix.removesuffix("_") or "weight")
    return getattr(saved, "form", None) if hasattr(getattr(saved, "form", None), "rank") else None


def _chain(
    files: WeightFiles, stem: str, down: str, candidates: tuple[str, ...]
) -> StoredWeight | None:
    dims = len(files.stored(down).shape) - 2
    known = map(get_decomposition, candidates)
    chains = sorted(known, key=lambda d: -len(d.factor_names(dims)))
    for decomposition in chains:  # the longest first: a shorter one may match a part of it
        names = tuple(f"{stem}{factor}" for factor in decomposition.factor_names(dims))
        if all(name in files.homes and files.stored(name).dtype for name in names):
            shapes = tuple(files.stored(name).shape for name in names)
            if found := _fitting(decomposition, shapes):
                return _product(files, stem[:-1] or "weight", names, *found)
    return None


def _product(
    files: WeightFiles,
    name: str,
    names: tuple[str, ...],
    shape: tuple[int, ...],
    decomposition: Decomposition,
) -> StoredWeight:
    def parts() -> tuple[Tensor, ...]:
        factors = tuple(files.read(factor) for factor in names)
        if decomposition.is_pair and decomposition.groups == 1:
            return factors
        if math.prod(shape) > _MOST_JOINED:
            raise ValueError(
                f"{files.path}: the factors of {printable(name)} multiply to "
                f"{math.prod(shape):,} values, at most {_MOST_JOINED:,} are computed"
            )
        return (decomposition.join(tuple(map(precise, factors))),)

    size = sum(math.prod(files.stored(factor).shape) for factor in names)
    return StoredWeight(name, shape, names, parts, size, "low-rank")


def _adapted(files: WeightFiles, chain: StoredWeight, base: str, form: Adapted) -> Claim | None:
    """``base + scale * join(factors)``; the base may be stored as (in, out, *kernel)."""
    stored = files.stored(base)
    swapped = (chain.shape[1], chain.shape[0], *chain.shape[2:])
    if stored.dtype is None or stored.shape not in (chain.shape, swapped):
        return None
    groups = int(stored.shape != chain.shape)

    def parts() -> tuple[Tensor, ...]:
        factors = tuple(precise(factor).flatten(1) for factor in chain.parts())
        stored = as_layer(files.read(base), groups)
        dtype = torch.promote_types(stored.dtype, torch.float32)
        weight = stored.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if len(factors) == 1:
            return (weight.add_(factors[0].reshape(weight.shape), alpha=form.scale),)
        down, up = factors
        rows = max(_ROWS // down.shape[1], 1)  # at a time: the product in fp64 is never whole
        for part, of_up in zip(weight.flatten(1).split(rows), up.split(rows), strict=True):
            part += form.scale * (of_up @ down)
        return (weight,)

    size = chain.parameters + math.prod(stored.shape)
    tensors = (base, *chain.tensors)
    return Claim((StoredWeight(chain.name, chain.shape, tensors, parts, size, "rebuilt"),), tensors)


def _fitting(
    decomposition: Decomposition, shapes: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], Decomposition] | None:
    """The weight's shape and the decomposition of its groups, if factors have these shapes."""
    *before, up = shapes
    if any(len(shape) != len(up) for shape in shapes) or 0 in up or before[-1][0] % up[1]:
        return None
    groups = before[-1][0] // up[1]
    kernel = (max(sizes) for sizes in zip(*(shape[2:] for shape in shapes), strict=True))
    shape = (up[0], before[0][1], *kernel)
    if groups < 1 or up[0] % groups:
        return None
    whole = get_decomposition(decomposition.name, groups)
    rank = max(first for first, *_ in before) // groups
    return (shape, whole) if rank and whole.shapes(shape, rank) == shapes else None


def lora_update(files: WeightFiles, name: str) -> Claim | None:
    """The update ``scale * B A`` of a LoRA adapter, as PEFT or kohya's scripts write it.

    The scale is ``alpha / r`` (``alpha / sqrt(r)`` with rsLoRA) from ``adapter_config.json`` or the
    tensor ``alpha`` beside the factors; where neither is there it is 1.
    """
    match = _LORA.fullmatch(name)
    if match is None:
        return None
    layer, first, adapter, weight = match.groups()
    other = f"{layer}.{_OTHER_FACTOR[first]}{adapter}{weight}"
    if other not in files.homes:
        return None
    down, up = files.stored(name).shape, files.stored(other).shape
    if not 2 <= len(down) == len(up) or down[0] != up[1] or not down[0]:
        return None
    path = layer.removeprefix("base_model.model.")
    beside = [n for n in (f"{layer}.alpha", _magnitude(files, layer)) if n in files.homes]
    if any("magnitude" in one for one in beside):
        return Claim((), (name, other, *beside), "DoRA: its update depends on the weight it adapts")

    def parts() -> tuple[Tensor, ...]:
        return files.read(name), files.read(other) * _lora_scale(files, layer, path, down[0])

    size, shape = math.prod(down) + math.prod(up), (up[0], *down[1:])
    update = StoredWeight(path, shape, (name, other), parts, size, "update")
    return Claim((update,), (name, other, *beside))


def _magnitude(files: WeightFiles, layer: str) -> str:
    begins = f"{layer}.lora_magnitude_vector"
    return next((n for n in (begins, f"{begins}.weight") if n in files.homes), begins)


def _lora_scale(files: WeightFiles, layer: str, path: str, rank: int) -> float:
    if f"{layer}.alpha" in files.homes:
        return float(files.read(f"{layer}.alpha").flatten()[0]) / rank
    config: Mapping[str, Any] = files.adapter
    alpha: Any = config.get("lora_alpha", None)
    for pattern, own in dict(config.get("alpha_pattern") or {}).items():
        if path == pattern or path.endswith(f".{pattern}"):
            alpha = own
    if not isinstance(alpha, int | float):
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
