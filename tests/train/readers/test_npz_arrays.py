"""Arrays of an .npz file, of any shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from dynarank.train.own_parts import make_parts
from dynarank.train.readers.npz_arrays import read
from dynarank.train.sources import DataError

GOOD: dict[str, Any] = {
    "x_train": np.arange(40.0).reshape(10, 4),
    "y_train": np.arange(10) % 2,
    "x_test": np.arange(8.0).reshape(2, 4),
    "y_test": np.arange(2),
}


def save(folder: Path, **changes: Any) -> str:
    np.savez(folder / "a.npz", **{k: v for k, v in (GOOD | changes).items() if v is not None})
    return "a.npz"


def test_dtypes(tmp_path: Path) -> None:
    (x, y), _ = read(save(tmp_path), tmp_path)
    assert (x.dtype, y.dtype, x.shape) == (torch.float32, torch.int64, (10, 4))
    pixels = {f"x_{part}": np.full((n, 5, 6, 3), 255, np.uint8) for part, n in (("train", 10), ("test", 2))}  # fmt: skip  # noqa: E501
    (x, _), _ = read(save(tmp_path, **pixels), tmp_path, channels_last=True)
    assert x.shape == (10, 3, 5, 6) and bool((x == 1).all())
    real = {"y_train": np.ones((10, 1)) * 0.5, "y_test": np.ones((2, 1))}
    assert read(save(tmp_path, **real), tmp_path)[0][1].shape == (10,)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"x_test": None}, "it lacks x_test"),
        ({"x_test": np.zeros((2, 5))}, r"examples of x_train are \(4,\), of x_test \(5,\)"),
        ({"y_train": np.zeros(9)}, "as many examples, they have 10 and 9"),
        ({"x_train": np.full((10, 4), np.nan)}, r"x_train\[0, 0\] is nan, and 39 more"),
        ({"x_train": np.zeros((0, 4))}, "1 or more examples"),
        ({"y_train": np.array(["a"] * 10)}, "must have numbers"),
        ({"y_train": np.zeros(10, int)}, "one class"),
        ({"y_train": np.arange(10) - 1}, "class below 0, -1 at 0"),
        ({"x_train": np.array([None] * 10)}, "not a valid .npz|must have numbers"),
    ],
)
def test_what_is_wrong(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        read(save(tmp_path, **changes), tmp_path)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / save(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"not a valid .npz file"):
        read("a.npz", tmp_path)


@pytest.mark.parametrize("kind", [">f4", "longdouble", "u2", ">i8"])
def test_types_that_torch_lacks(kind: str, tmp_path: Path) -> None:
    x, y = GOOD["x_train"].astype(kind), GOOD["y_train"].astype(">i4")
    train, _ = make_parts(read(save(tmp_path, x_train=x, y_train=y), tmp_path), "a", 2)
    read_x, read_y = cast("Any", train).fields
    assert torch.equal(read_x.double(), torch.from_numpy(GOOD["x_train"]))
    real = np.dtype(kind).kind == "f"
    assert read_x.dtype == (torch.float32 if real else torch.int64)
    assert torch.equal(read_y, torch.from_numpy(GOOD["y_train"]))
