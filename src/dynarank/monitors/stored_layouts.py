"""Weights that files keep in parts or in few bits: each function knows one layout by its names.

Called with the name of any tensor, it returns a :class:`Claim` if that tensor begins its layout,
with all tensors that belong to it, else None.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynarank.files.printable import printable
from dynarank.monitors.quantized import as_scale, block_of, multiply_blocks_, unpack_fp4
from dynarank.monitors.stored_weight import Claim, StoredWeight, as_layer, layer_shape
from dynarank.monitors.weight_files import WeightFiles

__all__ = [
    "expert_count",
    "experts_of",
    "is_stack",
    "packed_fp4",
    "packed_integers",
    "parametrized",
    "scaled",
    "spectral_norm",
    "unclear_stack",
    "unknown_scales",
    "weight_norm",
]

_SCALES = ("_scale_inv", "_scale", "_scales")
_LAST = chr(0x10FFFF)  # sorts after every other character
_BARE_SCALES = ("scale", "scales", "scale_inv")
_NO_SCALES = re.compile(
    r"bias|input|output|act|lora|norm|[._][kv]_scale|_extra_state", re.IGNORECASE
)
_PACKED = {
    "qweight": "integers of GPTQ or AWQ, several packed in an int32",
    "W_q": "integers of HQQ, packed",
    "weight_packed": "integers of compressed-tensors, several packed in an int32",
}
_BESIDE_PACKED = ("qzeros", "scales", "g_idx", "weight_shape", "weight_scale", "weight_zero_point",
                  "weight_g_idx", "zero", "scale", "meta", "shape", "nbits")  # fmt: skip


def weight_norm(files: WeightFiles, name: str) -> Claim | None:
    """``W = g v / ||v||``, the norm over all dimensions but the one in which g has entries."""
    if name.endswith("_v"):
        path, size = name[:-2], f"{name[:-2]}_g"
    elif match := re.fullmatch(r"(?:(.*)\.)?parametrizations\.(.*)\.original1", name):
        path, size = ".".join(filter(None, match.groups())), f"{name[:-1]}0"
    else:
        return None
    if size not in files.homes or not _is_norm(files.stored(size).shape, files.stored(name).shape):
        return None
    if files.stored(size).dtype is None or files.stored(name).dtype is None:
        return None

    def direction() -> Tensor:
        lengths, vectors = files.read(size).float(), files.read(name).float()
        kept = [d for d in range(lengths.ndim) if lengths.shape[d] > 1]
        over = [d for d in range(vectors.ndim) if d not in kept] or list(range(vectors.ndim))
        norms = torch.linalg.vector_norm(vectors, dim=over, keepdim=True)
        return vectors * (lengths / norms)

    return _rebuilt(files, path, files.stored(name).shape, (size, name), direction)


def _is_norm(lengths: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether lengths of this shape are norms of a weight: of all of it, or of one dimension."""
    if not lengths or len(shape) < 2:
        return len(shape) > 1
    long = [(a, b) for a, b in zip(lengths, shape, strict=False) if a > 1]
    return len(lengths) == len(shape) and len(long) <= 1 and all(a == b for a, b in long)


def spectral_norm(files: WeightFiles, name: str) -> Claim | None:
    """``W / (u' W v)`` with the vectors that the layer keeps; ``prune``'s ``W * mask``."""
    if name.endswith("_orig"):
        path = name[:-5]
        u, v, mask = f"{path}_u", f"{path}_v", f"{path}_mask"
    elif match := re.fullmatch(r"(?:(.*)\.)?(parametrizations\.(.*))\.original", name):
        path = ".".join(filter(None, (match[1], match[3])))
        inside = name.removesuffix("original")
        u, v, mask = f"{inside}0._u", f"{inside}0._v", ""
    else:
        return None
    shape = files.stored(name).shape
    if files.stored(name).dtype is None or len(shape) < 2:
        return None
    if mask in files.homes:
        return _rebuilt(
            files, path, shape, (name, mask), lambda: files.read(name) * files.read(mask).float()
        )
    if u not in files.homes:
        return None
    rows, swapped = (
        math.prod(files.stored(u).shape),
        layer_shape(files, path.removesuffix(".weight"), shape),
    )
    dim = 1 if swapped[1] and shape[1] == rows else 0
    if shape[dim] != rows:
        return Claim((), (name, u, v), "a spectral norm over another dimension than its outputs")

    def normalized() -> Tensor:
        weight = files.read(name).float()
        matrix = weight.transpose(0, dim).flatten(1)
        product = matrix.T @ files.read(u).float()
        right = files.read(v).float() if v in files.homes else product / product.norm()
        return weight / torch.dot(product, right)

    return _rebuilt(files, path, shape, (name, u, *([v] if v in files.homes else [])), normalized)


def parametrized(files: WeightFiles, name: str) -> Claim | None:
    """Any other parametrization: what its module makes of the tensors is not in the file."""
    match = re.fullmatch(r"((?:.*\.)?parametrizations\.[^.]+)\.original\d*", name)
    if match is None or len(files.stored(name).shape) < 2:
        return None
    inside = tuple(n for n in files.homes if n.startswith(f"{match[1]}."))
    reason = "a parametrization that the file does not tell: call remove_parametrizations and save"
    return Claim((), inside, reason)


def _rebuilt(
    files: WeightFiles,
    path: str,
    shape: tuple[int, ...],
    tensors: tuple[str, ...],
    stored: Callable[[], Tensor],
) -> Claim:
    """A weight that is computed in the layout of its module."""
    layer = path.removesuffix(".weight")
    canonical, groups = layer_shape(files, layer, shape)

    def parts() -> tuple[Tensor, ...]:
        return (as_layer(stored(), groups),)

    size = math.prod(shape)
    return Claim((StoredWeight(layer, canonical, tensors, parts, size, "rebuilt"),), tensors)


def scaled(files: WeightFiles, name: str) -> Claim | None:
    """8-bit numbers with a scale for all, each row or each block; experts one by one."""
    scale = _scale_of(files, name)
    stored = files.stored(name)
    layer = name.removesuffix(".weight")
    numbers = stored.dtype is not None or stored.kind == "int8"
    if scale is None or not numbers or len(stored.shape) < 2:
        return None
    zeros = [n for n in (f"{name}_zero_point", f"{name}_format", f"{layer}.input_scale")
             if n in files.homes]  # fmt: skip
    used = (name, scale, *zeros)
    experts = stored.shape[0] if is_stack(files, layer, stored.shape) else 0
    if unclear := unclear_stack(files, name, stored.shape):
        return Claim((), used, unclear)
    shape, scales = stored.shape[bool(experts) :], files.stored(scale).shape
    own = bool(experts) and bool(scales) and scales[0] == experts
    block = block_of(shape, scales[own:], _told_block(files))
    if block is None:
        told = f"its scales {list(scales)} do not fit {list(stored.shape)}"
        return Claim((), used, told)
    if stored.kind == "int8" and any(name.endswith("zero_point") for name in zeros):
        return Claim((), used, "int8 with a zero point")
    factor = 1 / 127 if scale.endswith("SCB") else 1.0  # bitsandbytes keeps the largest of each row

    def read(index: int | None) -> Tensor:
        weight = files.read(name, index)
        weight = weight.clone() if stored.dtype == torch.float32 else weight.float()
        by = as_scale(files.read(scale, index if own else None)) * factor
        return multiply_blocks_(weight.flatten(1), by, block).reshape(shape)

    if experts:
        return Claim(experts_of(layer, experts, shape, used[:2], read), used)
    made = _rebuilt(files, name, shape, used[:2], lambda: read(None))
    return Claim(made.weights, used)


def _scale_of(files: WeightFiles, name: str) -> str | None:
    """The tensor of scales of a weight, by the names in use."""
    layer = name.removesuffix("weight")
    small = files.stored(name).kind[:6] in ("float8", "int8")
    names: list[str] = []
    if name.endswith("weight"):
        names += [f"{layer}scale_weight", f"{layer}SCB", f"{name}.SCB"]
    if name.endswith("weight") or small:
        names += [f"{name}{suffix}" for suffix in _SCALES]
    if small:
        names += [f"{place}{suffix}" for place in (layer, f"{name}.") for suffix in _BARE_SCALES]
    return next((n for n in names if n in files.homes and _is_number(files, n)), None)


def _is_number(files: WeightFiles, name: str) -> bool:
    stored = files.stored(name)
    return stored.dtype is not None or stored.kind in ("float8_e8m0", "float8_e8m0fnu", "uint8")


def _told_block(files: WeightFiles) -> Sequence[int]:
    config: Any = files.config.get("quantization_config")
    block: Any = config.get("weight_block_size") if isinstance(config, dict) else None
    plain = isinstance(block, list) and all(isinstance(b, int) and b > 0 for b in block)
    return block if plain else ()


def unknown_scales(files: WeightFiles, claims: Mapping[str, Claim]) -> dict[str, Claim]:
    """8-bit floats that no layout claimed, but whose scale may be a tensor beside them, or lost."""
    taken = {name for claim in claims.values() for name in claim.tensors}
    floats = [n for n in files.homes if files.stored(n).kind.startswith("float8")]
    scaled = any(name in taken for name in floats)
    order, found = sorted(files.homes), dict[str, Claim]()
    for name in floats:
        stored, layer = files.stored(name), name.removesuffix(".weight")
        if name in taken or len(stored.shape) < 2 or stored.dtype is None:
            continue
        inside = order[bisect(order, layer) : bisect(order, layer + _LAST)]
        beside = [n for n in inside if n != name and n not in taken and _may_scale(files, n, name)]
        if beside:
            reason = f"{stored.kind} beside {printable(beside[0])}, which may be its scale"
            found[name] = Claim((), (name, *beside), reason)
        elif scaled:
            reason = f"{stored.kind} without a scale, where other weights have one"
            found[name] = Claim((), (name,), reason)
    return found


def _may_scale(files: WeightFiles, name: str, weight: str) -> bool:
    """Whether a tensor whose name begins with that of a weight's layer may hold its scales."""
    own = name.removeprefix(weight.removesuffix(".weight"))
    few = 2 * math.prod(files.stored(name).shape) <= math.prod(files.stored(weight).shape)
    return few and own[:1] in (".", "_") and not _NO_SCALES.search(own)


def packed_fp4(files: WeightFiles, name: str) -> Claim | None:
    """fp4, two a byte: ``X_blocks`` with ``X_scales`` (gpt-oss), or NVFP4 with its two scales."""
    stored = files.stored(name)
    if stored.kind != "uint8" or len(stored.shape) < 2:
        return None
    if name.endswith("_blocks") and f"{name[:-6]}scales" in files.homes:
        return _mxfp4(files, name, f"{name[:-6]}scales")
    weight = name.removesuffix("_packed")
    scale, whole = f"{weight}_scale", f"{weight}_scale_2"
    inverse = f"{weight}_global_scale"
    second = next((n for n in (whole, inverse) if n in files.homes), None)
    if scale not in files.homes or second is None or len(stored.shape) != 2:
        return None
    shape = (stored.shape[0], 2 * stored.shape[1])
    block = block_of(shape, files.stored(scale).shape)
    used = (name, scale, second)
    if block is None or math.prod(files.stored(second).shape) != 1:
        return Claim((), used, "fp4 whose scales do not fit")

    def read() -> Tensor:
        by = files.read(second).float().flatten()
        by = files.read(scale).float() * (1 / by if second == inverse else by)
        return multiply_blocks_(unpack_fp4(files.read(name)), by, block)

    return Claim(_rebuilt(files, weight, shape, used, read).weights, used)


def _mxfp4(files: WeightFiles, name: str, scales: str) -> Claim | None:
    """Blocks (..., rows, G, b) of bytes with a scale (..., rows, G) for each 2 b numbers."""
    stored, by = files.stored(name).shape, files.stored(scales).shape
    if stored[:-1] != by or len(by) not in (2, 3):
        return Claim((), (name, scales), "fp4 whose scales do not fit")
    *_, rows, blocks, width = stored
    shape = (rows, 2 * blocks * width)

    def read(index: int | None) -> Tensor:
        numbers = unpack_fp4(files.read(name, index).flatten(1))
        return multiply_blocks_(numbers, as_scale(files.read(scales, index)), (1, 2 * width))

    used, path = (name, scales), name.removesuffix("_blocks")
    if len(by) == 3:
        return Claim(experts_of(path, by[0], shape, used, read), used)
    return Claim(_rebuilt(files, path, shape, used, lambda: read(None)).weights, used)


def packed_integers(files: WeightFiles, name: str) -> Claim | None:
    """Integers of fewer than 8 bits, packed: named, and left out with all that belongs to them."""
    layer, _, last = name.rpartition(".")
    stored = files.stored(name)
    if last in _PACKED and stored.dtype is None:
        beside = [f"{layer}.{other}" if layer else other for other in _BESIDE_PACKED]
        reason = f"{_PACKED[last]}: save a dequantized checkpoint"
        return Claim((), (name, *(n for n in beside if n in files.homes)), reason)
    inside = (
        tuple(n for n in files.homes if n.startswith(f"{name}.")) if stored.kind == "uint8" else ()
    )
    if any(n.endswith(".absmax") for n in inside):
        return Claim(
            (), (name, *inside), "4-bit numbers of bitsandbytes: save a dequantized checkpoint"
        )
    return None


_STACKS = re.compile(r"expert|moe(?:[._]|$)|switch_mlp", re.IGNORECASE)
_OWN_MODULE = re.compile(r"experts?[._]\d+[._]", re.IGNORECASE)  # one of several, not a stack
_LARGEST_KERNEL = 16
_UNCLEAR = "a stack of matrices or a convolution: neither its name nor config.json tells"
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts",
           "num_moe_experts")  # fmt: skip


def is_stack(files: WeightFiles, name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor (E, a, b) holds one matrix for each of E experts."""
    biased = _bias_dims(files, name, shape)
    if len(shape) != 3 or "conv" in name or biased == 1 or _OWN_MODULE.search(name):
        return False
    return bool(_STACKS.search(name)) or expert_count(files) == shape[0] or biased == 2


def unclear_stack(files: WeightFiles, name: str, shape: Sequence[int]) -> str:
    """Why it is not known whether a tensor is a stack of matrices; empty: it is known.

    Convolutions are called ``weight``, or have a bias or a small kernel.
    """
    layer = name.removesuffix(".weight")
    if len(shape) < 3 or "conv" in name.lower() or is_stack(files, layer, shape):
        return ""
    stacks = len(shape) > 3 and _STACKS.search(layer) and not _OWN_MODULE.search(layer)
    bare = re.search(r"(?:^|[._])weight$", name) is None and shape[-1] > _LARGEST_KERNEL
    unclear = (stacks or bare) and _bias_dims(files, layer, shape) != 1
    return _UNCLEAR if unclear else ""


def _bias_dims(files: WeightFiles, layer: str, shape: Sequence[int]) -> int:
    """The dimensions of a layer's bias: 2 for a stack (E, a, b), 1 for a convolution; 0: none."""
    bias = next((b for b in (f"{layer}.bias", f"{layer}_bias") if b in files.homes), None)
    if bias is None:
        return 0
    sizes = files.stored(bias).shape
    fits = len(sizes) == 2 and sizes[0] == shape[0] and sizes[1] in shape[1:]
    return 2 if fits else int(len(sizes) == 1 and sizes[0] in shape[:2])


def expert_count(files: WeightFiles) -> int | None:
    """The number of experts that the config tells."""
    configs: list[Any] = [files.config, *files.config.values()]
    known = [c.get(key) for c in configs if isinstance(c, dict) for key in _COUNTS]
    return next((n for n in known if isinstance(n, int) and n > 1), None)


def experts_of(
    name: str,
    count: int,
    shape: tuple[int, ...],
    tensors: tuple[str, ...],
    read: Callable[[int], Tensor],
) -> tuple[StoredWeight, ...]:
    """One weight for each expert of a stack, ``X[0]``, ``X[1]``, ..."""

    def part(index: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (read(index),)

    size = math.prod(shape)  # of one
    return tuple(
        StoredWeight(f"{name}[{i}]", shape, tensors, part(i), size, "expert") for i in range(count)
    )
