"""A reader for Fashion-MNIST in MNIST's idx format: a magic number, the sizes, then the bytes.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", arXiv 1708.07747, 2017. All numbers of a header are big-endian, 4 bytes each; the
magic number is 0x0800 plus the number of dimensions for arrays of unsigned bytes.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dynarank.train.image_files import ImageFiles, RawImages, checked_labels, listing
from dynarank.train.sources import DataError

__all__ = ["FASHION_MNIST", "read_idx"]

SHAPE = (1, 28, 28)
CLASSES = 10

_PARTS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_UNSIGNED_BYTES = 0x0800
_MAX_BYTES = 256 << 20  # of a file, unpacked; the training images take 47 MB


def _names(part: str) -> tuple[str, ...]:
    """The possible file names of a part: gzipped or not, with a dash or a dot."""
    dimensions = 3 if part.endswith("images") else 1
    return tuple(f"{part}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz"))


def _fashion_mnist(folder: Path) -> RawImages:
    paths = [_find(folder, part) for part in _PARTS]  # find all files before reading the first
    arrays = [read_idx(path) for path in paths]
    train, test = (_pair(paths[i : i + 2], arrays[i], arrays[i + 1]) for i in (0, 2))
    return RawImages(*train, *test)


FASHION_MNIST = ImageFiles(
    name="Fashion-MNIST",
    shape=SHAPE,
    classes=CLASSES,
    folders=("fashion-mnist", "FashionMNIST/raw"),
    names=tuple(name for part in _PARTS for name in _names(part)),
    wanted="train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, each plain or as .gz",
    read=_fashion_mnist,
    npz="fashion-mnist.npz",
    hub="zalandoresearch/fashion_mnist",
    columns=("image", "label"),
)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read the array of unsigned bytes in an idx file, which may be gzipped.

    Raises:
        DataError: if it is not an idx file, or is damaged.

    """
    content = _content(path)
    if len(content) < 4:
        raise DataError(f"{path} is {len(content)} bytes: no idx file; fetch it again")
    dimensions = int.from_bytes(content[:4], "big") - _UNSIGNED_BYTES
    start = 4 + 4 * dimensions
    if dimensions not in (1, 3) or len(content) < start:
        raise DataError(
            f"{path} must begin with 0x00000801 or 0x00000803 and its sizes, but begins with "
            f"0x{content[:4].hex()} and is {len(content):,} bytes: damaged or a different file; "
            "fetch it again"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        sizes = " x ".join(f"{size:,}" for size in shape)
        raise DataError(
            f"{path} must be exactly {start + math.prod(shape):,} bytes (a header of {start}, then "
            f"{sizes}), but is {len(content):,}: it is damaged; fetch it again"
        )
    writable = bytearray(memoryview(content)[start:])  # torch wants writable memory
    return np.frombuffer(writable, np.uint8).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a valid gzip file: {error}; it is damaged; fetch it again"
        ) from error
    if len(content) > _MAX_BYTES:
        raise DataError(
            f"{path} has more than {_MAX_BYTES:,} bytes: it is damaged or a different file; fetch "
            "it again"
        )
    return content


def _find(folder: Path, part: str) -> Path:
    names = _names(part)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"Fashion-MNIST has 4 files; {names[0]} (or {names[1]}) is missing from {folder}: "
        f"{listing(folder)}. Fetch it again"
    )


def _pair(
    paths: list[Path], images: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read images ``(N, 1, 28, 28)`` and their labels."""
    if images.ndim != 3 or images.shape[1:] != SHAPE[1:] or not len(images):
        raise DataError(
            f"{paths[0]} must hold images of shape (N, 28, 28) with N >= 1, but holds "
            f"{images.shape}: it is a different file"
        )
    return images[:, None], checked_labels(paths[1], labels, len(images), CLASSES)
