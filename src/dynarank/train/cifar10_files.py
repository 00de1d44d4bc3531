"""CIFAR-10 as its users have it: binary records, one .npz file, or the Hugging Face hub.

Every reader returns the raw bytes, checked, or raises; nothing is ever half read.
"""

from __future__ import annotations

import importlib
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "DataError", "RawImages", "read_files", "read_hub"]

CLASSES = 10
SHAPE = (3, 32, 32)
RECORDS_PER_FILE = 10_000  # every official .bin file holds this many
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
BINARY_FOLDER = "cifar-10-batches-bin"
NPZ_FILE = "cifar10.npz"
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
HUB_NAME = "uoft-cs/cifar10"

_RECORD_BYTES = 1 + 3 * 32 * 32  # a label, then the pixels, channel by channel
# All that numpy and zipfile were seen to raise on 12,000 .npz files damaged at random, and
# MemoryError, for a damaged header that claims a huge array.
_BROKEN_NPZ = (
    *(ValueError, OSError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


class DataError(ValueError):
    """A data set is absent, incomplete or damaged; the message says what to do."""


@dataclass(frozen=True, eq=False)
class RawImages:
    """Images as stored: uint8 ``(N, C, H, W)``, and their labels, int64 ``(N,)``."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def read_files(place: Path) -> RawImages:
    """Read CIFAR-10 from ``place``: an .npz file, or a folder that holds one of the known forms.

    Raises:
        DataError: if nothing readable is there, or a file is damaged.

    """
    if place.is_file():
        return _read_npz(place)
    if not place.is_dir():
        raise DataError(f"CIFAR-10 was asked for from {place}, which does not exist")
    for folder in (place, place / BINARY_FOLDER):
        if any((folder / name).exists() for name in (*TRAIN_FILES, TEST_FILE)):
            return _read_binary(folder)
    if (place / NPZ_FILE).is_file():
        return _read_npz(place / NPZ_FILE)
    raise DataError(
        f"CIFAR-10 was asked for from {place}, which must hold {TRAIN_FILES[0]} ... "
        f"{TRAIN_FILES[-1]} and {TEST_FILE} (itself, or in {BINARY_FOLDER}/) or {NPZ_FILE}; "
        f"{_listing(place)}"
    )


def read_hub() -> RawImages:
    """Read CIFAR-10 through ``datasets``, which downloads it or has it in its cache.

    Raises:
        ImportError: if the ``data`` extra is not installed.
        DataError: if the data set cannot be had.

    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            "CIFAR-10 was asked for from the hub, which needs the `datasets` package: "
            "pip install 'dynarank[data]'"
        ) from error
    try:
        splits = datasets.load_dataset(HUB_NAME)
        train, test = splits["train"], splits["test"]
        arrays = [_stack(train), train["label"], _stack(test), test["label"]]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"CIFAR-10 was asked for from the hub as {HUB_NAME!r}, which failed: {error!r}; "
            "try again, or name a folder that holds the binary version"
        ) from error
    images, labels, test_images, test_labels = (np.asarray(a) for a in arrays)
    return _checked(f"the hub's {HUB_NAME}", images, labels, test_images, test_labels)


def _stack(split: Any) -> NDArray[Any]:
    return np.stack([np.asarray(image) for image in split["img"]])


def _listing(folder: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    if not names:
        return "it is empty"
    rest = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"it holds {', '.join(names[:12])}{rest}"


def _read_binary(folder: Path) -> RawImages:
    for name in (*TRAIN_FILES, TEST_FILE):  # all of them before the first is read
        _check_size(folder / name)
    train, test = _records(folder, TRAIN_FILES), _records(folder, (TEST_FILE,))
    return RawImages(*train, *test)


def _check_size(path: Path) -> None:
    if not path.is_file():
        raise DataError(
            f"CIFAR-10's binary version has 6 files; {path.name} is missing from {path.parent}: "
            f"{_listing(path.parent)}. Unpack cifar-10-binary.tar.gz there again"
        )
    wanted, found = RECORDS_PER_FILE * _RECORD_BYTES, path.stat().st_size
    if found != wanted:
        raise DataError(
            f"{path} must be exactly {wanted:,} bytes ({RECORDS_PER_FILE:,} records of "
            f"{_RECORD_BYTES:,}), but is {found:,}: it is damaged or another file; fetch it again"
        )


def _records(folder: Path, names: tuple[str, ...]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = np.empty((len(names) * RECORDS_PER_FILE, *SHAPE), np.uint8)
    labels = np.empty(len(images), np.int64)
    for i, name in enumerate(names):
        records = np.fromfile(folder / name, np.uint8).reshape(-1, _RECORD_BYTES)
        rows = slice(i * RECORDS_PER_FILE, (i + 1) * RECORDS_PER_FILE)
        labels[rows] = _checked_labels(folder / name, records[:, 0], RECORDS_PER_FILE)
        images[rows] = records[:, 1:].reshape(-1, *SHAPE)
    return images, labels


def _read_npz(path: Path) -> RawImages:
    try:
        _check_members(path)
        with np.load(path, allow_pickle=False) as arrays:
            found = [np.asarray(arrays[key]) for key in NPZ_KEYS]
    except DataError:
        raise
    except _BROKEN_NPZ as error:
        raise DataError(
            f"{path} was read as an .npz file of CIFAR-10 and cannot be: {error}; "
            "it is damaged or another file; make or fetch it again"
        ) from error
    return _checked(str(path), *found)


def _check_members(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist()]
        # numpy does not reach a member's checksum where a damaged header claims fewer bytes
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
    if missing := [key for key in NPZ_KEYS if key not in held]:
        raise DataError(
            f"{path} must hold the arrays {', '.join(NPZ_KEYS)}; it lacks {', '.join(missing)} "
            f"and holds {', '.join(held) or 'nothing'}"
        )


def _checked(
    source: str,
    train_images: NDArray[Any],
    train_labels: NDArray[Any],
    test_images: NDArray[Any],
    test_labels: NDArray[Any],
) -> RawImages:
    return RawImages(
        _checked_images(f"{source}: x_train", train_images),
        _checked_labels(f"{source}: y_train", train_labels, len(train_images)),
        _checked_images(f"{source}: x_test", test_images),
        _checked_labels(f"{source}: y_test", test_labels, len(test_images)),
    )


def _checked_images(source: str, images: NDArray[Any]) -> NDArray[np.uint8]:
    channels_last = images.shape[1:] == (32, 32, 3)
    right_shape = images.ndim == 4 and (channels_last or images.shape[1:] == SHAPE)
    if images.dtype != np.uint8 or not right_shape or not len(images):
        raise DataError(
            f"{source} must be uint8 of shape (N, 32, 32, 3) or (N, 3, 32, 32) with N >= 1, "
            f"but is {images.dtype} of shape {images.shape}"
        )
    return images.transpose(0, 3, 1, 2) if channels_last else images


def _checked_labels(source: str | Path, labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise DataError(
            f"{source} must be integer labels of shape ({count},) or ({count}, 1), one an image, "
            f"but is {labels.dtype} of shape {labels.shape}"
        )
    wrong = np.flatnonzero((labels.reshape(-1) < 0) | (labels.reshape(-1) >= CLASSES))
    if len(wrong):
        raise DataError(
            f"{source}: labels must be 0 to {CLASSES - 1}, but record {wrong[0]} has label "
            f"{labels.reshape(-1)[wrong[0]]} ({len(wrong)} such): the file is damaged or another"
        )
    return labels.reshape(-1).astype(np.int64)
