"""Spectra of the weights in a model's files, with one weight in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dynarank.decompositions import (
    Decomposition,
    UnfitWeightError,
    decomposition_names,
    get_decomposition,
    precise,
)
from dynarank.files.json_data import DamagedFileError
from dynarank.files.printable import printable
from dynarank.monitors.singular_values import product_singular_values, singular_values
from dynarank.monitors.weight_files import WeightFiles, open_weights

__all__ = ["StoredWeight", "WeightSpectrum", "file_spectra", "read_spectrum", "stored_weights"]

_MOST_JOINED = 1 << 28  # values, 2 GiB in fp64: factors of a few bytes can multiply to terabytes


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a model's files that has not been read yet.

    Args:
        name: its name, without a trailing ``.weight``.
        shape: (out, in, *kernel), for factors that of their product.
        tensors: the names of its tensors: a single one, or a chain of factors.
        decomposition: the decomposition of the factors; None for a single tensor.
    """

    name: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    decomposition: Decomposition | None = None


@dataclass(frozen=True)
class WeightSpectrum:
    """The spectrum of one weight.

    Args:
        name: its name, without a trailing ``.weight``.
        shape: (out, in, *kernel), for factors that of their product.
        values: its singular values, largest first, in fp64; None if it is not finite.
    """

    name: str
    shape: tuple[int, ...]
    values: Tensor | None


def stored_weights(files: WeightFiles) -> list[StoredWeight]:
    """All floating-point tensors of two or more dimensions, in the files' order.

    The factors of a low-rank layer of dynarank (``X.down``, ..., ``X.up``) count as their product
    ``X``. Those of an adapter, next to an ``X.base``, do not: its scale is not in the file.

    Raises:
        ValueError: there are none, or two have the same name.
    """
    chains = {w.tensors[0]: w for name in files.homes if (w := _chain(files, name))}
    inside = {name for weight in chains.values() for name in weight.tensors}
    found: list[StoredWeight] = []
    for name in files.homes:
        stored = files.stored(name)
        if name in chains:
            found.append(chains[name])
        elif name not in inside and stored.dtype and len(stored.shape) > 1:
            found.append(StoredWeight(name.removesuffix(".weight"), stored.shape, (name,)))
    found = [weight for weight in found if math.prod(weight.shape)]
    _refuse_twins(files, found)
    if not found:
        raise ValueError(f"{files.path} contains no weight of two or more dimensions")
    return found


def _refuse_twins(files: WeightFiles, weights: Iterable[StoredWeight]) -> None:
    """Refuse ``a`` beside ``a.weight``: nothing says which one is the layer's."""
    seen: dict[str, StoredWeight] = {}
    for weight in weights:
        twin = seen.setdefault(weight.name, weight)
        if twin is not weight:
            names = " and ".join(printable(one.tensors[0]) for one in (twin, weight))
            raise DamagedFileError(
                files.path, f"{names} are both the weight of {printable(weight.name)}", "rename one"
            )


def read_spectrum(files: WeightFiles, weight: StoredWeight) -> WeightSpectrum:
    """Read a weight and compute its spectrum, without keeping it in memory.

    Raises:
        ValueError: it is larger than the memory, or its file has become shorter.
    """
    try:
        values = _values(files, weight)
    except UnfitWeightError:
        values = None
    except (MemoryError, RuntimeError) as error:
        shape = "x".join(map(str, weight.shape))
        raise ValueError(
            f"{files.path}: the spectrum of {printable(weight.name)}, {printable(shape)}, cannot "
            f"be computed: {printable(str(error))}"
        ) from error
    return WeightSpectrum(weight.name, weight.shape, values)


def file_spectra(path: Path) -> Iterator[WeightSpectrum]:
    """The spectra of all weights at a path, see :func:`stored_weights`.

    Raises:
        FileNotFoundError: the path does not exist, or a shard is missing.
        ValueError: the files are truncated, do not fit each other, or contain no weights.
    """
    files = open_weights(path)
    for weight in stored_weights(files):
        yield read_spectrum(files, weight)


def _values(files: WeightFiles, weight: StoredWeight) -> Tensor:
    parts = tuple(files.homes[name].read(name) for name in weight.tensors)
    if weight.decomposition is None:
        return singular_values(parts[0], exact=True)
    if weight.decomposition.is_pair and weight.decomposition.groups == 1:
        return product_singular_values(*(part.flatten(1) for part in parts))
    if math.prod(weight.shape) > _MOST_JOINED:
        raise ValueError(
            f"{files.path}: the factors of {printable(weight.name)} multiply to "
            f"{math.prod(weight.shape):,} values, at most {_MOST_JOINED:,} are computed"
        )
    return singular_values(weight.decomposition.join(tuple(map(precise, parts))), exact=True)


def _chain(files: WeightFiles, down: str) -> StoredWeight | None:
    """The low-rank weight whose first factor this is; None if it is not one."""
    match = re.fullmatch(r"(.*[._])?down", down)
    if match is None or f"{match[1] or ''}base" in files.homes:
        return None
    stem, dims = match[1] or "", len(files.stored(down).shape) - 2
    if not 0 <= dims <= 3:
        return None
    known = map(get_decomposition, decomposition_names())
    chains = sorted(known, key=lambda d: -len(d.factor_names(dims)))
    for decomposition in chains:  # the longest first: a shorter one may match a part of it
        names = tuple(f"{stem}{factor}" for factor in decomposition.factor_names(dims))
        if all(name in files.homes and files.stored(name).dtype for name in names):
            shapes = tuple(files.stored(name).shape for name in names)
            if found := _fitting(decomposition, shapes):
                return StoredWeight(stem[:-1] or "weight", found[0], names, found[1])
    return None


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
