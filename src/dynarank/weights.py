"""Spectra of the weights in a safetensors file, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynarank.decompositions import UnfitWeightError, get_decomposition
from dynarank.spectrum import singular_values

__all__ = ["WeightSpectrum", "file_spectra"]

_SVD = get_decomposition("svd")


@dataclass(frozen=True)
class WeightSpectrum:
    """One weight of a file.

    Args:
        name: its name, without a trailing ``.weight``.
        shape: (out, in, *kernel); of the product, for a pair of factors.
        values: its singular values, largest first, in fp64; None if it is not finite.
    """

    name: str
    shape: tuple[int, ...]
    values: Tensor | None


def file_spectra(path: Path) -> Iterator[WeightSpectrum]:
    """The spectrum of every floating-point tensor of two or more dimensions, in the file's order.

    A pair ``X.down``, ``X.up`` (a low-rank layer of dynarank's) counts as its product, ``X``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a whole safetensors file, or holds no such tensor.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if not any(len(file.get_slice(name).get_shape()) > 1 for name in names):
                raise ValueError(f"{path} holds no weight of two or more dimensions")
            for name in names:
                tensor = _weight(file, name, names)
                if tensor is not None and tensor.is_floating_point() and tensor.ndim > 1:
                    yield _spectrum(_label(name), tensor)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _weight(file: safe_open, name: str, names: list[str]) -> Tensor | None:
    """The tensor, or the product it is the first factor of; None for a second factor."""
    stem, _, last = name.rpartition(".")
    paired = {f"{stem}.down", f"{stem}.up"} <= set(names) and f"{stem}.base" not in names
    if not paired or last not in ("down", "up"):
        return file.get_tensor(name)
    if last == "up":
        return None
    down, up = file.get_tensor(name), file.get_tensor(f"{stem}.up")
    return _SVD.join((down.double(), up.double()))


def _label(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".down") or name


def _spectrum(name: str, tensor: Tensor) -> WeightSpectrum:
    try:
        values = singular_values(tensor)
    except UnfitWeightError:
        values = None
    return WeightSpectrum(name, tuple(tensor.shape), values)
