"""Spectra of the weights in a model's files, with one weight in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynarank.decompositions import UnfitWeightError
from dynarank.files.printable import printable
from dynarank.monitors.large_weights import large_singular_values
from dynarank.monitors.singular_values import product_singular_values
from dynarank.monitors.stored_weight import StoredWeight
from dynarank.monitors.stored_weights import stored_weights
from dynarank.monitors.weight_files import WeightFiles, open_weights

__all__ = ["WeightSpectrum", "file_spectra", "read_spectrum"]


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


def read_spectrum(
    files: WeightFiles, weight: StoredWeight, device: torch.device | None = None
) -> WeightSpectrum:
    """Read a weight and compute its spectrum, without keeping it in memory.

    Args:
        files: the weight's.
        weight: which.
        device: where to compute; None: on the CPU.

    Raises:
        ValueError: it is larger than the memory, or its file has become shorter.
    """
    try:
        values = _values(weight, device or torch.device("cpu"), _room(files))
    except UnfitWeightError:
        values = None
    except (MemoryError, RuntimeError) as error:
        shape = "x".join(map(str, weight.shape))
        raise ValueError(
            f"{files.path}: the spectrum of {printable(weight.name)}, {printable(shape)}, cannot "
            f"be computed: {printable(str(error))}"
        ) from error
    return WeightSpectrum(weight.name, weight.shape, values)


def _room(files: WeightFiles) -> int:
    """Bytes that a spectrum may take: twice the largest tensor in fp32."""
    return 8 * max((math.prod(files.stored(name).shape) for name in files.homes), default=0)


def _values(weight: StoredWeight, device: torch.device, room: int) -> Tensor:
    if weight.kind in ("low-rank", "update"):
        parts = weight.parts()
        if len(parts) == 2:
            down, up = (part.flatten(1).to(device) for part in parts)
            return product_singular_values(down, up).cpu()
    return large_singular_values(lambda: weight.parts()[0], device, room)


def file_spectra(path: Path) -> Iterator[WeightSpectrum]:
    """The spectra of all weights at a path, see :func:`stored_weights`.

    Raises:
        FileNotFoundError: the path does not exist, or a shard is missing.
        ValueError: the files are truncated, do not fit each other, or contain no weights.
    """
    files = open_weights(path)
    for weight in stored_weights(files):
        yield read_spectrum(files, weight)
