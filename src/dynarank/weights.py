"""Spectra of the weights in a safetensors file, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynarank.decompositions import SVD, UnfitWeightError
from dynarank.spectrum import singular_values

__all__ = ["WeightSpectrum", "file_spectra"]

_SVD = SVD()


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
    found = False
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in file.keys():
                label, tensor = _weight(file, name, names)
                if (
                    tensor is not None
                    and tensor.is_floating_point()
                    and tensor.ndim > 1
                    and tensor.numel()
                ):
                    found = True
                    yield _spectrum(label, tensor)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no weight of two or more dimensions")


def _weight(file: safe_open, name: str, names: set[str]) -> tuple[str, Tensor | None]:
    """A label and the tensor, or the product it is a factor of; None for the second factor."""
    stem, dot, last = name.rpartition(".")
    down, up = f"{stem}{dot}down", f"{stem}{dot}up"
    if last not in ("down", "up") or not {down, up} <= names or f"{stem}{dot}base" in names:
        return name.removesuffix(".weight"), file.get_tensor(name)
    factors = file.get_tensor(down), file.get_tensor(up)
    if not _SVD.fits(factors):
        return name, file.get_tensor(name)
    joined = _SVD.join((factors[0].double(), factors[1].double())) if last == "down" else None
    return stem or "weight", joined


def _spectrum(name: str, tensor: Tensor) -> WeightSpectrum:
    try:
        values = singular_values(tensor, exact=True)
    except UnfitWeightError:
        values = None
    return WeightSpectrum(name, tuple(tensor.shape), values)
