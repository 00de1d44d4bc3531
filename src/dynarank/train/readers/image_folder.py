"""Images in class folders: ``train/cat/1.png`` and ``test/cat/2.png``, or one tree of classes.

Read by Pillow, as RGB or, if all are, gray; normalized by channel with mean and standard deviation
of training images. What takes less than 1 GiB is kept in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dynarank.sinks.extras import import_extra
from dynarank.train.image_files import listing
from dynarank.train.readers.splits import check_share, find, split
from dynarank.train.sources import DataError

__all__ = ["read"]

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_TESTS = ("test", "val", "validation", "valid")
_GRAY, _COLOR = {"1", "L"}, {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_IN_MEMORY = 1 << 30
_MEASURED = 1000  # images for mean and standard deviation, if not all are in memory
_STD_FLOOR = 0.05  # of the full scale; CIFAR-10 has 0.2 or more


def read(
    place: str,
    folder: Path,
    *,
    size: int | Sequence[int] | None = None,
    test_share: float = 0.2,
    augment: bool = False,
) -> Any:
    """Read a folder of images.

    Args:
        place: the folder, relative to ``folder``.
        folder: the recipe's folder.
        size: the height and width, or one number for both, to which images are resized; None: they
            have one size.
        test_share: of one tree, the share that is held out, the same for every run.
        augment: random flips, and crops of the image padded by an eighth of its side.

    Raises:
        DataError: there are no class folders, a file is damaged, or the sizes differ.
        ImportError: Pillow is not installed.
    """
    root, share = find(place, folder), check_share("test_share", test_share)
    size = _checked_size(size)
    parts = _find_parts(root, share)
    files = [path for paths, _ in parts for path in paths]
    shape = _shape(files, size)
    classes = int(parts[0][1].max()) + 1
    keep = len(files) * shape[0] * shape[1] * shape[2] <= _IN_MEMORY
    train, test = (_Images(*part, shape, classes, keep=keep) for part in parts)
    mean, std = train.statistics()
    for part in (train, test):
        part.mean, part.std = mean, std
    train.augment = augment
    return train, test


def _checked_size(size: Any) -> tuple[int, int] | None:
    pair = (size, size) if isinstance(size, int) else size
    if size is None:
        return None
    if len(pair) != 2 or not all(type(side) is int and side >= 1 for side in pair):
        raise DataError(f"size must be a number of pixels, or height and width, got {size!r}")
    return pair[0], pair[1]


Part = tuple[list[Path], Tensor]


def _find_parts(root: Path, share: float) -> tuple[Part, Part]:
    """Paths and labels of training and test images."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder; imagefolder: reads a folder of class folders")
    if not (root / "train").is_dir():
        paths, labels = _find_images(root, _class_names(root))
        train, test = split(labels, share)
        return _chosen(paths, labels, train), _chosen(paths, labels, test)
    held = next((root / name for name in _TESTS if (root / name).is_dir()), None)
    if held is None:
        raise DataError(f"{root} has train/ but none of {', '.join(_TESTS)}; {listing(root)}")
    names = _class_names(root / "train")
    if others := [name for name in _folders(held) if name not in names]:
        raise DataError(f"{held} has the class {others[0]!r}, which {root / 'train'} has not")
    return _find_images(root / "train", names), _find_images(held, names, all_classes=False)


def _chosen(paths: list[Path], labels: Tensor, indices: Tensor) -> Part:
    return [paths[index] for index in indices.tolist()], labels[indices]


def _folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _class_names(root: Path) -> list[str]:
    names = _folders(root)
    if len(names) < 2:
        raise DataError(f"{root} must have a folder for each of 2 or more classes; {listing(root)}")
    return names


def _find_images(root: Path, names: Sequence[str], *, all_classes: bool = True) -> Part:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in _ENDINGS)
        found = [path for path in found if path.is_file() and not path.name.startswith(".")]
        if not found and (all_classes or (root / name).is_dir()):
            listed = ", ".join(sorted(_ENDINGS))
            raise DataError(f"the class folder {root / name} has no images ({listed})")
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataError(f"{root} has no images")
    return paths, torch.tensor(labels)


def _shape(files: Sequence[Path], size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(channels, height, width) of all images, from the heads of their files."""
    heads = [_head(path) for path in files]
    gray = all(mode in _GRAY for mode, _ in heads)
    for path, (mode, pixels) in zip(files, heads, strict=True):
        if mode not in _COLOR:
            raise DataError(f"{path} has the mode {mode!r}; 8-bit gray or color is read")
        if size is None and pixels != heads[0][1]:
            first = "x".join(map(str, heads[0][1]))
            raise DataError(
                f"{path} has {pixels[0]}x{pixels[1]} pixels, {files[0]} {first}; set size in "
                "data_options, to resize all"
            )
    height, width = size if size is not None else heads[0][1][::-1]
    return 1 if gray else 3, height, width


def _head(path: Path) -> tuple[str, tuple[int, int]]:
    pillow = import_extra("PIL.Image", "data", "imagefolder:")
    try:
        with pillow.open(path) as image:
            return image.mode, image.size
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def _decode(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """An image as uint8 ``(C, H, W)``."""
    pillow = import_extra("PIL.Image", "data", "imagefolder:")
    try:
        with pillow.open(path) as image:
            found = image.convert("L" if shape[0] == 1 else "RGB")
            if found.size != (shape[2], shape[1]):
                found = found.resize((shape[2], shape[1]), pillow.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(found, np.uint8))
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}; it is damaged") from error
    return pixels.view(shape[1], shape[2], shape[0]).permute(2, 0, 1)


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels, normalized.

    Args:
        paths: the files.
        labels: int64 ``(N,)``.
        shape: (channels, height, width).
        classes: the number of classes.
        keep: whether the pixels are kept in memory.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        shape: tuple[int, int, int],
        classes: int,
        *,
        keep: bool,
    ) -> None:
        self.paths, self.labels, self.shape = paths, labels, shape
        self.classes = list(range(classes))
        self.pixels = torch.stack([_decode(p, shape) for p in paths]) if keep else None
        self.mean, self.std = torch.zeros(shape[0], 1, 1), torch.ones(shape[0], 1, 1)
        self.augment = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = (self._raw(index).float() / 255 - self.mean) / self.std
        return self._augmented(image) if self.augment else image, self.labels[index]

    def _raw(self, index: int) -> Tensor:
        return _decode(self.paths[index], self.shape) if self.pixels is None else self.pixels[index]

    def _augmented(self, image: Tensor) -> Tensor:
        """A crop of the padded image, flipped or not."""
        _, height, width = image.shape
        rows, columns = max(1, height // 8), max(1, width // 8)
        padded = F.pad(image, (columns, columns, rows, rows))
        top, left = int(torch.randint(2 * rows + 1, ())), int(torch.randint(2 * columns + 1, ()))
        cut = padded[:, top : top + height, left : left + width]
        return cut.flip(2) if torch.rand(()) < 0.5 else cut

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, ``(C, 1, 1)``, of evenly spaced images."""
        chosen = torch.linspace(0, len(self) - 1, min(len(self), _MEASURED)).long().tolist()
        raw = torch.stack([self._raw(index) for index in chosen]).double() / 255
        mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3), correction=0)
        return mean.float()[:, None, None], std.clamp_min(_STD_FLOOR).float()[:, None, None]

    def fingerprint(self) -> Tensor:
        """A digest of names, sizes and, in memory, pixels."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
        if self.pixels is not None:
            digest.update(self.pixels.numpy().data)
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
