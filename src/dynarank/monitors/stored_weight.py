"""A weight in a model's files that has not been read yet, and what tells its layout."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from dynarank.decompositions.geometry import swap_channels
from dynarank.monitors.weight_files import WeightFiles

__all__ = ["Claim", "Kind", "LeftOut", "StoredWeight", "as_layer", "layer_shape", "natural_order"]

Kind: TypeAlias = Literal["plain", "low-rank", "rebuilt", "expert", "update"]
_TRANSPOSED = re.compile(r"transpose|deconv|(?:^|[._])conv_?t(?:[._\d]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a model's files that has not been read yet.

    Args:
        name: its name, without a trailing ``.weight``: the path of its layer in the model, except
            for one expert of several and for updates.
        shape: (out, in, *kernel), for factors that of their product.
        tensors: the names of the tensors it is made of.
        parts: reads the weight, or ``down`` (r, in, *kernel) and ``up`` (out, r, ...).
        parameters: how many numbers of the layer it takes up now.
        kind: ``plain`` as stored, ``low-rank`` a product of factors, ``rebuilt`` from scales, norms
            or an adapter, ``expert`` one of a stack, ``update`` of a weight elsewhere (LoRA).
        groups: of a grouped convolution, where the layer before it tells.
    """

    name: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    parts: Callable[[], tuple[Tensor, ...]]
    parameters: int
    kind: Kind = "plain"
    groups: int = 1

    @property
    def matrix(self) -> tuple[int, int]:
        """(n, m) of the weight as a matrix, out x (in * kernel positions)."""
        return self.shape[0], math.prod(self.shape[1:])


@dataclass(frozen=True)
class LeftOut:
    """A tensor that may be a weight, but is not read as one.

    Args:
        name: its name in the file.
        shape: as stored.
        dtype: as stored.
        reason: why.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass(frozen=True)
class Claim:
    """What a layout makes of some tensors: weights, or a reason why they are left out."""

    weights: tuple[StoredWeight, ...]
    tensors: tuple[str, ...]
    reason: str = ""


def layer_shape(
    files: WeightFiles, name: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
    """The shape (out, in / groups, *kernel) of a stored weight, and its groups if it is swapped.

    Transposed convolutions and the ``Conv1D`` of GPT-2 are stored as (in, out / groups, *kernel).
    The file does not say so, but the length of the bias is the number of outputs; where there is
    none, that of the norm which follows, or the layer's name.

    Args:
        files: the weight's.
        name: of the layer.
        shape: as stored.

    Returns:
        The shape, and the groups; 0 if it is stored as the layer multiplies.
    """
    groups = _swapped_groups(files, name, shape)
    if not groups:
        return shape, 0
    return (shape[1] * groups, shape[0] // groups, *shape[2:]), groups


def as_layer(stored: Tensor, groups: int) -> Tensor:
    """The weight (out, in / groups, *kernel), from its stored layout and :func:`layer_shape`."""
    return swap_channels(stored, groups) if groups else stored


def _swapped_groups(files: WeightFiles, name: str, shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return 0
    outputs = _outputs(files, name, convolution=len(shape) > 2)
    if outputs is None and len(shape) == 2:
        return int(_is_wide_conv1d(name, shape))
    if outputs in (None, shape[0]):
        square = shape[0] == shape[1] or outputs is None
        return int(len(shape) > 2 and square and bool(_TRANSPOSED.search(name)))
    groups, rest = divmod(outputs, shape[1])
    fits = not rest and shape[0] % groups == 0
    return groups if fits and (groups == 1 or len(shape) > 2) else 0


def _is_wide_conv1d(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight named as GPT-2's has the sides of its ``Conv1D``, stored as (in, out).

    Its projections widen, to the queries, keys and values or to the MLP, but for the MLP's last.
    """
    parent, _, last = name.rpartition(".")
    if last in ("c_attn", "q_attn", "c_fc"):
        return shape[1] > shape[0]
    return last == "c_proj" and parent.endswith("mlp") and shape[0] > shape[1]


def _outputs(files: WeightFiles, name: str, convolution: bool) -> int | None:
    """The number of outputs of a layer, from its bias or the norm after it."""
    candidates = [f"{name}.bias"]
    if convolution and (place := re.fullmatch(r"(.*?)(\d{1,18})", name)):
        candidates.append(f"{place[1]}{int(place[2]) + 1}.weight")  # in a Sequential
    if convolution and "conv" in name:
        candidates += [f"{name.replace('conv', norm)}.weight" for norm in ("bn", "norm")]
    for candidate in candidates:
        if candidate in files.homes and len(shape := files.stored(candidate).shape) == 1:
            return shape[0]
    return None


def natural_order(names: Iterable[str]) -> list[str]:
    """Names with their numbers in order, 10 after 2, and the rest in the order of appearance.

    Example:
        >>> natural_order(["h.0.b", "h.10.a", "h.2.a", "h.0.a"])
        ['h.0.b', 'h.0.a', 'h.2.a', 'h.10.a']
    """
    places: dict[tuple[int, str], int] = {}  # of each part after the parts before it
    keys: dict[str, list[tuple[int, int]]] = {}
    for name in names:
        key: list[tuple[int, int]] = []
        before = -1
        for i, part in enumerate(re.split(r"(\d{1,18})", name)):
            before = places.setdefault((before, part), len(places))
            key.append((i % 2, int(part) if i % 2 else before))
        keys[name] = key
    return sorted(keys, key=lambda name: keys[name])
