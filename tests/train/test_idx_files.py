"""Fashion-MNIST's idx files: whole, in every form they come in, and damaged."""

from __future__ import annotations

import gzip
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynarank.train.data import load_fashion_mnist
from dynarank.train.idx_files import read_idx
from dynarank.train.sources import DataError

TRAIN, TEST = 40, 20
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


@pytest.fixture(autouse=True)
def _no_place(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "data" not in request.keywords:
        monkeypatch.delenv("DYNARANK_DATA", raising=False)


def arrays() -> list[np.ndarray]:
    """Train images and labels, test images and labels."""
    rng = np.random.default_rng(0)
    sizes: list[tuple[int, ...]] = [(TRAIN, 28, 28), (TRAIN,), (TEST, 28, 28), (TEST,)]
    highest = [256, 10, 256, 10]
    pairs = zip(sizes, highest, strict=True)
    return [rng.integers(0, top, size, dtype=np.uint8) for size, top in pairs]


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return struct.pack(">I", 0x0800 + array.ndim) + sizes + array.tobytes()


def write(folder: Path, *, zipped: tuple[int, ...] = (), dots: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, array) in enumerate(zip(FILES, arrays(), strict=True)):
        name = name.replace("-idx", ".idx") if dots else name
        content = idx(array)
        if i in zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def check(place: str | None) -> None:
    """The data read from a place are those of ``arrays``, normalized pixel by pixel."""
    data = load_fashion_mnist(place)
    train, labels, test, test_labels = arrays()
    mean, std = train.astype(float).mean(0), train.astype(float).std(0)
    wanted = torch.from_numpy((test - mean) / std).float()[:, None]
    assert data.train_images.shape == (TRAIN, 1, 28, 28) and data.classes == 10
    torch.testing.assert_close(data.test_images, wanted, rtol=1e-5, atol=1e-5)
    assert data.train_labels.tolist() == labels.tolist()
    assert data.test_labels.tolist() == test_labels.tolist()


@pytest.mark.parametrize("inside", [".", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [(), (0, 1, 2, 3), (1, 3)])
def test_the_files_in_every_usual_place(
    tmp_path: Path, inside: str, zipped: tuple[int, ...]
) -> None:
    write(tmp_path / inside, zipped=zipped)
    check(str(tmp_path))


def test_names_with_a_dot(tmp_path: Path) -> None:
    check(str(write(tmp_path, dots=True)))


def test_a_folder_of_several_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "fashion-mnist")
    for other in ("cifar-100-binary/train.bin", "MNIST/raw/train-images-idx3-ubyte"):
        (tmp_path / other).parent.mkdir(parents=True)
        (tmp_path / other).write_bytes(b"of another set")
    monkeypatch.setenv("DYNARANK_DATA", str(tmp_path))
    check(None)


@pytest.mark.parametrize("shape", [(-1, 28, 28), (-1, 28, 28, 1), (-1, 1, 28, 28)])
def test_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x, y, u, v = arrays()
    held = {"x_train": x.reshape(shape), "y_train": y, "x_test": u.reshape(shape), "y_test": v}
    np.savez(tmp_path / "fashion-mnist.npz", **held)  # type: ignore[arg-type]
    check(str(tmp_path))
    check(str(tmp_path / "fashion-mnist.npz"))


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> dict[str, Any]:
        assert name == "zalandoresearch/fashion_mnist"
        x, y, u, v = arrays()
        return {
            "train": {"image": list(x), "label": y.tolist()},
            "test": {"image": list(u), "label": v.tolist()},
        }

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    check("hub")


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    (write(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=rf"4 files; {missing} .*is missing from .*it contains t"):
        load_fashion_mnist(str(tmp_path))


def test_no_place_and_an_empty_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no location .* Fashion-MNIST .*its four idx files.*hub"):
        load_fashion_mnist(None)
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.*FashionMNIST/raw/.*it is empty"):
        load_fashion_mnist(str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        load_fashion_mnist(str(tmp_path / "nowhere"))


WRONG = {
    "short": (0, lambda whole: whole[:3], "is 3 bytes: no idx file"),
    "cut": (0, lambda whole: whole[:-1], r"exactly 31,376 bytes \(a header of 16, then 40 x 28"),
    "long": (2, lambda whole: whole + b"\0", "exactly 15,696 bytes .* but is 15,697"),
    "magic": (1, lambda whole: b"\0\0\x0d\x01" + whole[4:], "0x00000801 or .*0x00000d01"),
    "header": (0, lambda whole: whole[:10], "begins with 0x00000803 and is 10 bytes"),
    "label": (1, lambda whole: whole[:-1] + b"\x0a", "labels must be 0 to 9, but record 39"),
    "fewer": (3, lambda whole: idx(arrays()[3][:-1]), r"shape \(20,\) or .*\(19,\)"),
    "shape": (0, lambda whole: idx(arrays()[0][:, :, :27]), r"\(N, 28, 28\).*\(40, 28, 27\)"),
    "none": (2, lambda whole: idx(arrays()[2][:0]), "N >= 1"),
    "swapped": (0, lambda whole: idx(arrays()[1]), r"\(N, 28, 28\).*holds \(40,\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_damaged_or_other_files(tmp_path: Path, case: str) -> None:
    at, damage, message = WRONG[case]
    path = write(tmp_path) / FILES[at]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as raised:
        load_fashion_mnist(str(tmp_path))
    assert FILES[at] in str(raised.value)


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_damaged_gzip_file_raises_or_reads_true(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int, cut: bool
) -> None:
    array = arrays()[1]
    whole = gzip.compress(idx(array))
    at %= len(whole)
    changed = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    path = tmp_path_factory.mktemp("gz") / "labels.gz"
    path.write_bytes(whole[:at] if cut else changed)
    try:
        found = read_idx(path)
    except DataError:
        return
    assert not cut and found.tolist() == array.tolist()


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("DYNARANK_DATA"), reason="DYNARANK_DATA is not set")
def test_real_fashion_mnist() -> None:
    data = load_fashion_mnist(None)
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [6_000] * 10
    assert data.test_labels.bincount().tolist() == [1_000] * 10
    assert data.test_labels[:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]  # the official order
