"""Readers for image data sets: the standard files, one .npz file, or the hub.

Every reader returns the complete, validated raw bytes or raises.
"""

from __future__ import annotations

import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynarank.files.printable import printable
from dynarank.train.sources import DataError, hub_splits

__all__ = [
    "ImageFiles",
    "RawImages",
    "checked_labels",
    "listing",
    "read_files",
    "read_hub",
    "read_npz",
]

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

_MAX_BYTES = 1 << 30  # of an .npz file, unpacked; CIFAR takes 184 MB

# All exceptions that numpy and zipfile raised on 12,000 randomly damaged .npz files; MemoryError,
# for a damaged header that claims a huge array; and those of other kinds of compression.
_BROKEN_NPZ = (
    *(ValueError, OSError, EOFError, RuntimeError, MemoryError, TypeError, LookupError),
    *(ArithmeticError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError),
)


@dataclass(frozen=True, eq=False)
class RawImages:
    """Images as stored: uint8 ``(N, C, H, W)``, and their labels, int64 ``(N,)``."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


@dataclass(frozen=True)
class ImageFiles:
    """The names and file formats of a data set.

    Args:
        name: the usual name of the data set.
        shape: (channels, height, width).
        classes: the number of classes.
        folders: subfolders that may contain the standard files.
        names: the standard files; if one of them exists, all are expected.
        wanted: the standard files, in words.
        read: a function that reads them from a folder.
        npz: the name of its .npz file.
        hub: its name on the Hugging Face hub.
        columns: the hub's column names of the images and the labels.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    folders: tuple[str, ...]
    names: tuple[str, ...]
    wanted: str
    read: Callable[[Path], RawImages]
    npz: str
    hub: str
    columns: tuple[str, str]


def read_files(files: ImageFiles, place: Path) -> RawImages:
    """Read a data set from an .npz file, or from a folder with the standard files or an .npz file.

    Raises:
        DataError: if nothing readable is there, or a file is damaged.

    """
    if place.is_file():
        return _read_npz(files, place)
    if not place.is_dir():
        raise DataError(f"{files.name}: {place} does not exist")
    for folder in (*(place / name for name in files.folders), place):
        if any((folder / name).exists() for name in files.names):
            return files.read(folder)
    if (place / files.npz).is_file():
        return _read_npz(files, place / files.npz)
    raise DataError(
        f"{files.name} is not in {place}, which must contain {files.wanted} (directly, or in "
        f"{' or '.join(f'{name}/' for name in files.folders)}) or {files.npz}; {listing(place)}"
    )


def read_hub(files: ImageFiles) -> RawImages:
    """Read a data set through ``datasets``, from the hub or its cache.

    Raises:
        ImportError: if the ``data`` extra is not installed.
        DataError: if the data set cannot be loaded.

    """
    image, label = files.columns
    with hub_splits(files.name, "its files", files.hub) as splits:
        parts = [splits["train"], splits["test"]]
        arrays = [np.asarray(a) for part in parts for a in (_stack(part[image]), part[label])]
    return _checked(files, f"the hub's {files.hub}", *arrays)


def listing(folder: Path) -> str:
    """A folder's contents, for error messages."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    if not names:
        return "it is empty"
    rest = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"it contains {printable(', '.join(names[:12]))}{rest}"


def checked_labels(
    source: str | Path, labels: NDArray[Any], count: int, classes: int
) -> NDArray[np.int64]:
    """Check labels and convert them to int64 ``(N,)``.

    Raises:
        DataError: if they are not ``count`` integers from 0 to ``classes - 1``.

    """
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise DataError(
            f"{source} must be integer labels of shape ({count},) or ({count}, 1), one per image, "
            f"but is {labels.dtype} of shape {labels.shape}"
        )
    wrong = np.flatnonzero((labels.reshape(-1) < 0) | (labels.reshape(-1) >= classes))
    if len(wrong):
        raise DataError(
            f"{source}: labels must be 0 to {classes - 1}, but record {wrong[0]} has label "
            f"{labels.reshape(-1)[wrong[0]]} ({len(wrong)} such): the file is damaged or another"
        )
    return labels.reshape(-1).astype(np.int64)


def _stack(images: Any) -> NDArray[Any]:
    return np.stack([np.asarray(image) for image in images])


def _read_npz(files: ImageFiles, path: Path) -> RawImages:
    return _checked(files, str(path), *read_npz(path, files.name))


def read_npz(path: Path, what: str) -> list[NDArray[Any]]:
    """The arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test`` of an .npz file.

    Args:
        path: the file.
        what: its content in words, for the error message.

    Raises:
        DataError: it is damaged, or lacks one of them.
    """
    try:
        _check_members(path)
        with np.load(path, allow_pickle=False) as arrays:
            return [np.asarray(arrays[key]) for key in NPZ_KEYS]
    except DataError:
        raise
    except _BROKEN_NPZ as error:
        raise DataError(
            f"{path} is not a valid .npz file of {what}: {printable(str(error))}; "
            "it is damaged or a different file; make or fetch it again"
        ) from error


def _check_members(path: Path) -> None:
    """Check that the arrays are there, how large they are unpacked, then their checksums."""
    with zipfile.ZipFile(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist()]
        if missing := [key for key in NPZ_KEYS if key not in held]:
            raise DataError(
                f"{path} must contain the arrays {', '.join(NPZ_KEYS)}; it lacks "
                f"{', '.join(missing)} and contains {printable(', '.join(held)) or 'nothing'}"
            )
        if len(set(held)) < len(held):
            raise zipfile.BadZipFile("it contains an array twice")
        used = [one for one in archive.infolist() if one.filename.removesuffix(".npy") in NPZ_KEYS]
        if (size := sum(one.file_size for one in used)) > _MAX_BYTES:
            raise DataError(
                f"{path} unpacks to {size:,} bytes, at most {_MAX_BYTES:,} are read: it is a "
                "different file"
            )
        for one in used:
            _check_checksum(archive, one)


def _check_checksum(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Read a member to its end; numpy does not if a damaged header claims fewer bytes."""
    try:
        with archive.open(member) as file:
            while file.read(1 << 20):
                pass
    except zipfile.BadZipFile as error:
        raise zipfile.BadZipFile(f"{member.filename} does not match its checksum") from error


def _checked(
    files: ImageFiles,
    source: str,
    train_images: NDArray[Any],
    train_labels: NDArray[Any],
    test_images: NDArray[Any],
    test_labels: NDArray[Any],
) -> RawImages:
    return RawImages(
        _checked_images(files, f"{source}: x_train", train_images),
        checked_labels(f"{source}: y_train", train_labels, len(train_images), files.classes),
        _checked_images(files, f"{source}: x_test", test_images),
        checked_labels(f"{source}: y_test", test_labels, len(test_images), files.classes),
    )


def _checked_images(files: ImageFiles, source: str, images: NDArray[Any]) -> NDArray[np.uint8]:
    channels, height, width = files.shape
    able: list[tuple[int, ...]] = [(height, width, channels), files.shape]
    able = [(height, width), *able] if channels == 1 else able
    if images.dtype != np.uint8 or images.shape[1:] not in able or not len(images):
        listed = " or ".join(f"(N, {', '.join(map(str, shape))})" for shape in able)
        raise DataError(
            f"{source} must be uint8 of shape {listed} with N >= 1, "
            f"but is {images.dtype} of shape {images.shape}"
        )
    last = images.shape[1:] == (height, width, channels)
    return images.transpose(0, 3, 1, 2) if last else images.reshape(-1, *files.shape)
