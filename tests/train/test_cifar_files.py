import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dynarank.sinks.extras import install_command
from dynarank.train import cifar_files
from dynarank.train.cifar_files import CIFAR10
from dynarank.train.data import ImageData, load_cifar10, load_cifar100
from dynarank.train.image_files import read_files
from dynarank.train.sources import DataError

RECORDS = 20
TRAIN = 5 * RECORDS
BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)]


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar_files, "CIFAR10_RECORDS", RECORDS)
    monkeypatch.delenv("DYNARANK_DATA", raising=False)


@pytest.fixture
def images() -> np.ndarray:
    """All images, train then test: uint8 (N, C, H, W)."""
    return np.random.default_rng(0).integers(0, 256, (TRAIN + RECORDS, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 10, TRAIN + RECORDS)


def write_binary(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], 1)
    for i, name in enumerate([*BATCHES, "test_batch.bin"]):
        rows[i * RECORDS : (i + 1) * RECORDS].tofile(folder / name)
    return folder


def npz_arrays(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "x_train": images[:TRAIN],
        "y_train": labels[:TRAIN],
        "x_test": images[TRAIN:],
        "y_test": labels[TRAIN:],
    }


def write_npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez_compressed(path, **arrays)
    return str(path)


def assert_is(data: ImageData, images: np.ndarray, labels: np.ndarray) -> None:
    """Compare with the published normalization, spelled out in float64."""
    scaled = images / 255.0
    mean, std = scaled[:TRAIN].mean(0), scaled[:TRAIN].std(0)
    wanted = torch.from_numpy((scaled - mean) / std).float()
    assert data.classes == 10
    assert data.train_images.dtype == torch.float32 and data.train_images.is_contiguous()
    torch.testing.assert_close(data.train_images, wanted[:TRAIN], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(data.test_images, wanted[TRAIN:], rtol=1e-5, atol=1e-5)
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train_labels.tolist() == labels[:TRAIN].tolist()
    assert data.test_labels.tolist() == labels[TRAIN:].tolist()


@pytest.mark.parametrize("inside", [".", "cifar-10-batches-bin"])
def test_binary(tmp_path: Path, images: np.ndarray, labels: np.ndarray, inside: str) -> None:
    write_binary(tmp_path / inside, images, labels)
    assert_is(load_cifar10(str(tmp_path)), images, labels)


def test_environment_variable(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNARANK_DATA", str(write_binary(tmp_path, images, labels)))
    assert_is(load_cifar10(None), images, labels)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("by_folder", [True, False])
def test_npz(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, channels_last: bool, by_folder: bool
) -> None:
    arrays = npz_arrays(images, labels[:, None])
    if channels_last:
        arrays |= {key: arrays[key].transpose(0, 2, 3, 1) for key in ("x_train", "x_test")}
    path = write_npz(tmp_path / "cifar10.npz", **arrays)
    assert_is(load_cifar10(str(tmp_path) if by_folder else path), images, labels)


def hub(images: np.ndarray, labels: np.ndarray) -> SimpleNamespace:
    def load_dataset(name: str) -> dict[str, dict[str, list]]:
        assert name == "uoft-cs/cifar10"
        pixels, found = list(images.transpose(0, 2, 3, 1)), labels.tolist()
        return {
            "train": {"img": pixels[:TRAIN], "label": found[:TRAIN]},
            "test": {"img": pixels[TRAIN:], "label": found[TRAIN:]},
        }

    return SimpleNamespace(load_dataset=load_dataset)


def test_hub(images: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", hub(images, labels))
    assert_is(load_cifar10("hub"), images, labels)


def test_hub_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=re.escape(install_command("data"))):
        load_cifar10("hub")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"uoft-cs/cifar10.*no route.*pass a folder"):
        load_cifar10("hub")


@pytest.mark.parametrize("folder", [None, ""])
def test_no_place_named(folder: str | None) -> None:
    with pytest.raises(DataError, match=r"DYNARANK_DATA.*binary version.*\.npz.*hub"):
        load_cifar10(folder)


def test_place_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"CIFAR-10: .*nowhere does not exist"):
        load_cifar10(str(tmp_path / "nowhere"))


def test_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is empty"):
        load_cifar10(str(tmp_path))
    (tmp_path / "cifar-10-batches-py").mkdir()
    for i in range(13):
        (tmp_path / f"n{i:02}.txt").touch()
    with pytest.raises(DataError, match=r"it contains cifar-10-batches-py/, n00.txt,.* and 2 more"):
        load_cifar10(str(tmp_path))


@pytest.mark.parametrize("missing", ["data_batch_1.bin", "data_batch_4.bin", "test_batch.bin"])
def test_missing_file(tmp_path: Path, images: np.ndarray, labels: np.ndarray, missing: str) -> None:
    (write_binary(tmp_path, images, labels) / missing).unlink()
    with pytest.raises(DataError, match=rf"{missing} is missing from .*it contains data_batch_"):
        load_cifar10(str(tmp_path))


@pytest.mark.parametrize("change", [-1, 1, -3073])
def test_wrong_size(tmp_path: Path, images: np.ndarray, labels: np.ndarray, change: int) -> None:
    path = write_binary(tmp_path, images, labels) / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes((whole + b"\0")[: len(whole) + change])
    with pytest.raises(DataError, match=rf"data_batch_3.bin.*61,460 bytes.*{61460 + change:,}"):
        load_cifar10(str(tmp_path))


def test_label_out_of_range(tmp_path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    labels[3 * RECORDS + 7] = 10
    write_binary(tmp_path, images, labels)
    with pytest.raises(DataError, match=r"data_batch_4.bin.*0 to 9.*record 7 has label 10"):
        load_cifar10(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("x_train", None, "lacks x_train and contains y_train, x_test, y_test"),
        ("x_train", np.zeros((TRAIN, 3, 32, 32), np.float32), "x_train must be uint8.*float32"),
        ("x_train", np.zeros((TRAIN, 32, 32), np.uint8), r"x_train must be.*\(100, 32, 32\)"),
        ("x_train", np.zeros((TRAIN, 3, 16, 64), np.uint8), "x_train must be"),
        ("x_test", np.zeros((0, 3, 32, 32), np.uint8), "x_test must be.*N >= 1"),
        ("x_test", np.array(7, np.uint8), r"x_test must be.*shape \(\)"),
        ("y_train", np.zeros(TRAIN - 1, np.int64), r"y_train must be.*\(100,\).*\(99,\)"),
        ("y_train", np.zeros((TRAIN, 2), np.int64), "y_train must be integer labels"),
        ("y_train", np.zeros(TRAIN), "y_train must be integer labels.*float64"),
        ("y_test", np.full(RECORDS, -1), "y_test: labels must be 0 to 9, but record 0 has .*-1"),
        ("y_test", np.array([object()] * RECORDS), "allow_pickle=False"),
    ],
)
def test_wrong_npz(
    tmp_path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    key: str,
    wrong: np.ndarray | None,
    message: str,
) -> None:
    arrays = npz_arrays(images, labels)
    arrays.pop(key)
    if wrong is not None:
        arrays[key] = wrong
    path = write_npz(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_cifar10(path)


def test_not_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"tar.gz is not a valid .npz file.*not a zip file"):
        load_cifar10(str(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_raises_or_reads_true(tmp_path: Path, save: object) -> None:
    """One byte changed anywhere, or the end cut off: never another exception, nor other data."""
    path, rng = tmp_path / "cifar10.npz", np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    arrays = {"x_train": pixels, "y_train": [1, 2, 3], "x_test": pixels[:1], "y_test": [4]}
    save(path, **arrays)  # type: ignore[operator]
    whole, raised = path.read_bytes(), 0
    for at in [*range(0, 400), *rng.integers(0, len(whole), 400)]:
        damaged = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        path.write_bytes(whole[:at] if at % 10 == 0 else damaged)
        try:
            raw = read_files(CIFAR10, path)
        except DataError:
            raised += 1
        else:
            assert (raw.train_images == pixels).all() and raw.train_labels.tolist() == [1, 2, 3]
            assert (raw.test_images == pixels[:1]).all() and raw.test_labels.tolist() == [4]
    assert raised > 600


def test_npz_whose_header_claims_fewer_bytes(tmp_path: Path) -> None:
    """numpy alone reads other labels here and never reaches the checksum."""
    path = tmp_path / "cifar10.npz"
    pixels, labels = np.zeros((1100, 3, 32, 32), np.uint8), np.arange(1100) % 10
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    path.write_bytes(path.read_bytes().replace(b"'<i8'", b"'<i4'"))
    with pytest.raises(DataError, match="checksum"):
        load_cifar10(str(path))


# CIFAR-100: records of a coarse label, a fine one and the pixels.

FINE = {"train.bin": 50, "test.bin": 20}


@pytest.fixture
def hundred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files: the fine label of record i is 7 i mod 100, its coarse one i mod 20."""
    monkeypatch.setattr(cifar_files, "CIFAR100_RECORDS", FINE)
    rng = np.random.default_rng(0)
    for name, count in FINE.items():
        at = np.arange(count)[:, None]
        pixels = rng.integers(0, 256, (count, 3072))
        np.concatenate([at % 20, at * 7 % 100, pixels], 1).astype(np.uint8).tofile(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("inside", [".", "cifar-100-binary"])
def test_cifar100_has_the_fine_labels(hundred: Path, inside: str) -> None:
    (hundred / inside).mkdir(exist_ok=True)
    for name in FINE:
        (hundred / name).rename(hundred / inside / name)
    data = load_cifar100(str(hundred))
    assert data.classes == 100
    assert data.train_labels.tolist() == [7 * i % 100 for i in range(50)]
    assert data.test_labels.tolist() == [7 * i % 100 for i in range(20)]
    pixels = np.fromfile(hundred / inside / "train.bin", np.uint8).reshape(50, 3074)[:, 2:]
    wanted = (pixels - pixels.mean(0)) / pixels.std(0)
    found = data.train_images.flatten(1).double()
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "byte", "value", "message"),
    [
        ("train.bin", 3074 * 4, 20, r"train.bin: labels must be 0 to 19, but record 4 has .* 20"),
        (
            "test.bin",
            3074 * 9 + 1,
            100,
            r"test.bin: labels must be 0 to 99, but record 9 .*100",
        ),
        ("test.bin", None, 0, r"test.bin must be exactly 61,480 bytes \(20 records of 3,074\)"),
    ],
)
def test_cifar100_damaged(
    hundred: Path, name: str, byte: int | None, value: int, message: str
) -> None:
    content = bytearray((hundred / name).read_bytes())
    if byte is None:
        content = content[:-1]
    else:
        content[byte] = value
    (hundred / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_cifar100(str(hundred))


def test_cifar100_missing(hundred: Path) -> None:
    (hundred / "test.bin").unlink()
    with pytest.raises(DataError, match=r"CIFAR-100's binary version has 2 files; test.bin is"):
        load_cifar100(str(hundred))
    (hundred / "train.bin").unlink()
    with pytest.raises(
        DataError, match=r"contain train.bin and test.bin .*cifar-100-binary/.*empty"
    ):
        load_cifar100(str(hundred))


def test_cifar100_from_the_hub(monkeypatch: pytest.MonkeyPatch, images: np.ndarray) -> None:
    def load_dataset(name: str) -> dict[str, dict[str, list]]:
        assert name == "uoft-cs/cifar100"
        pixels = list(images.transpose(0, 2, 3, 1))
        part = {"img": pixels[:20], "fine_label": [99] * 20, "coarse_label": [0] * 20}
        return {"train": part, "test": part}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_cifar100("hub").test_labels.tolist() == [99] * 20
