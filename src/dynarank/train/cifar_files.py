"""A reader for the binary versions of CIFAR-10 and CIFAR-100: labels followed by pixels.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dynarank.train.image_files import ImageFiles, RawImages, checked_labels, listing
from dynarank.train.sources import DataError

__all__ = ["CIFAR10", "CIFAR100"]

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32  # bytes, channel by channel
CIFAR10_RECORDS = 10_000  # per file, in six files
CIFAR100_RECORDS = {"train.bin": 50_000, "test.bin": 10_000}
COARSE_CLASSES = 20

_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


@dataclass(frozen=True)
class _Binary:
    """The layout of a binary version.

    Args:
        name: the name of the data set.
        archive: the name of its archive.
        classes: the number of classes of each label in a record; the last label is used.
        records: the number of records by file name, the test file last.
    """

    name: str
    archive: str
    classes: tuple[int, ...]
    records: dict[str, int]

    @property
    def record_bytes(self) -> int:
        return len(self.classes) + PIXELS


def _cifar10(folder: Path) -> RawImages:
    records = dict.fromkeys((*_BATCHES, "test_batch.bin"), CIFAR10_RECORDS)
    return _read(_Binary("CIFAR-10", "cifar-10-binary.tar.gz", (10,), records), folder)


def _cifar100(folder: Path) -> RawImages:
    classes = (COARSE_CLASSES, 100)
    return _read(_Binary("CIFAR-100", "cifar-100-binary.tar.gz", classes, CIFAR100_RECORDS), folder)


CIFAR10 = ImageFiles(
    name="CIFAR-10",
    shape=SHAPE,
    classes=10,
    folders=("cifar-10-batches-bin",),
    names=(*_BATCHES, "test_batch.bin"),
    wanted=f"{_BATCHES[0]} ... {_BATCHES[-1]} and test_batch.bin",
    read=_cifar10,
    npz="cifar10.npz",
    hub="uoft-cs/cifar10",
    columns=("img", "label"),
)
CIFAR100 = ImageFiles(
    name="CIFAR-100",
    shape=SHAPE,
    classes=100,
    folders=("cifar-100-binary",),
    names=("train.bin", "test.bin"),
    wanted="train.bin and test.bin",
    read=_cifar100,
    npz="cifar100.npz",
    hub="uoft-cs/cifar100",
    columns=("img", "fine_label"),
)


def _read(binary: _Binary, folder: Path) -> RawImages:
    for name in binary.records:  # check all files before reading the first
        _check_size(binary, folder / name)
    *train, test = binary.records
    return RawImages(*_records(binary, folder, train), *_records(binary, folder, [test]))


def _check_size(binary: _Binary, path: Path) -> None:
    if not path.is_file():
        raise DataError(
            f"{binary.name}'s binary version has {len(binary.records)} files; {path.name} is "
            f"missing from {path.parent}: {listing(path.parent)}. "
            f"Unpack {binary.archive} there again"
        )
    records, found = binary.records[path.name], path.stat().st_size
    wanted = records * binary.record_bytes
    if found != wanted:
        raise DataError(
            f"{path} must be exactly {wanted:,} bytes ({records:,} records of "
            f"{binary.record_bytes:,}), but is {found:,}: damaged or a different file; fetch it "
            "again"
        )


def _records(
    binary: _Binary, folder: Path, names: list[str]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    count = sum(binary.records[name] for name in names)
    images, labels = np.empty((count, *SHAPE), np.uint8), np.empty(count, np.int64)
    start = 0
    for name in names:
        records = np.fromfile(folder / name, np.uint8).reshape(-1, binary.record_bytes)
        rows = slice(start, start := start + len(records))
        for column, classes in enumerate(binary.classes):  # the last label is kept
            labels[rows] = checked_labels(folder / name, records[:, column], len(records), classes)
        images[rows] = records[:, len(binary.classes) :].reshape(-1, *SHAPE)
    return images, labels
