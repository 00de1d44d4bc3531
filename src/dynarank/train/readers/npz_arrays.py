"""Arrays of an .npz file: ``x_train``, ``y_train``, ``x_test`` and ``y_test``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dynarank.train.image_files import NPZ_KEYS, read_npz
from dynarank.train.own_parts import from_array
from dynarank.train.readers.splits import find
from dynarank.train.sources import DataError

__all__ = ["read"]


def read(place: str, folder: Path, *, channels_last: bool = False) -> Any:
    """Read the arrays; floats become float32, pixels (uint8) floats from 0 to 1, labels int64.

    Args:
        place: the file, relative to ``folder``.
        folder: the recipe's folder.
        channels_last: whether the last dimension of ``x`` is that of the channels; it is then moved
            in front of the others, as torch has it.

    Raises:
        DataError: the file is damaged, an array is missing or of other shapes, or a value is not
            finite.
    """
    path = find(place, folder)
    names: dict[str, NDArray[Any]] = dict(zip(NPZ_KEYS, read_npz(path, "arrays"), strict=True))
    for name, array in names.items():
        _check(path, name, array)
    for part in ("train", "test"):
        x, y = names[f"x_{part}"], names[f"y_{part}"]
        if len(x) != len(y):
            raise DataError(
                f"{path}: x_{part} and y_{part} must have as many examples, they have {len(x)} and "
                f"{len(y)}"
            )
    for name in ("x", "y"):
        one, two = names[f"{name}_train"], names[f"{name}_test"]
        if one.shape[1:] != two.shape[1:]:
            raise DataError(
                f"{path}: examples of {name}_train are {one.shape[1:]}, of {name}_test "
                f"{two.shape[1:]}; they must have one shape"
            )
    targets = [_targets(path, name, names[name]) for name in ("y_train", "y_test")]
    inputs = [_inputs(names[name], channels_last) for name in ("x_train", "x_test")]
    if not targets[0].is_floating_point() and len(targets[0].unique()) < 2:
        raise DataError(f"{path}: y_train has one class, {targets[0].unique().tolist()}; 2 or more")
    return (inputs[0], targets[0]), (inputs[1], targets[1])


def _check(path: Path, name: str, array: NDArray[Any]) -> None:
    if array.dtype.kind not in "biuf" or array.ndim == 0 or not len(array):
        raise DataError(
            f"{path}: {name} must have numbers and 1 or more examples, it is {array.dtype} of "
            f"shape {array.shape}"
        )
    if array.dtype.kind == "f":
        wrong = np.argwhere(~np.isfinite(array))
        if len(wrong):
            place = tuple(map(int, wrong[0]))
            raise DataError(
                f"{path}: {name}{list(place)} is {array[place]}, and {len(wrong) - 1} more values "
                "are not finite; leave these examples out, or fill them in"
            )


def _inputs(array: NDArray[Any], channels_last: bool) -> Tensor:
    x = from_array(array)
    if array.dtype == np.uint8 and array.ndim > 2:
        x = x.float() / 255
    x = x.float() if x.is_floating_point() else x
    return x.movedim(-1, 1).contiguous() if channels_last else x


def _targets(path: Path, name: str, array: NDArray[Any]) -> Tensor:
    y = from_array(array)
    y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y
    if y.is_floating_point():
        return y.float()
    if (y := y.long()).min() < 0:
        first = int((y.flatten() < 0).nonzero()[0])
        raise DataError(f"{path}: {name} has a class below 0, {y.flatten()[first]} at {first}")
    return y
