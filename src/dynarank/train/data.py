"""The image data sets of the recipes, in memory and normalized.

Pixels are normalized individually: each of the C x H x W positions has its own mean and standard
deviation over the training set, as in the published code of the method.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dynarank.sinks.extras import import_extra, install_command
from dynarank.train.batches import crop_and_flip
from dynarank.train.cifar_files import CIFAR10, CIFAR100
from dynarank.train.draws import epoch_generator
from dynarank.train.idx_files import FASHION_MNIST
from dynarank.train.image_files import ImageFiles, RawImages, read_files, read_hub
from dynarank.train.sources import DataError

__all__ = [
    "ImageData",
    "limit",
    "limit_test",
    "load_cifar10",
    "load_cifar100",
    "load_digits_data",
    "load_fashion_mnist",
    "load_shifted_digits",
]

_SPLIT_SEED = 0  # the split of the digits; part of the data set's definition, not an option
_ORDER_SEED = 0  # the order in which `limit` takes images; part of its definition too
_DIGITS_TEST = 360
_SHIFTED_TEST, _SHIFT, _SHIFT_COPIES, _SHIFT_SEED = 900, 2, 4, 0  # the shifted digits, likewise
_STD_FLOOR = 0.05  # of the full scale; below it a pixel is nearly constant (CIFAR-10: 0.2 or more)
_CHUNK = 1_000


@dataclass(frozen=True, eq=False)
class ImageData:
    """A classification data set: images float32 ``(N, C, H, W)``, normalized; labels int64."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: int


def load_digits_data() -> ImageData:
    """Scikit-learn's handwritten digits: 1,437 + 360 images of 1 x 8 x 8, with a fixed split.

    Raises:
        ImportError: if scikit-learn is not installed.

    """
    return _normalized(_digits(test=_DIGITS_TEST), classes=10, scale=16)


def load_shifted_digits() -> ImageData:
    """The digits at random positions: 3,588 + 3,600 images of 1 x 12 x 12.

    Each of 897 + 900 digits is there four times, each time up to two pixels off the center in
    either direction. Split and positions are fixed.

    Raises:
        ImportError: if scikit-learn is not installed.

    """
    raw = _digits(test=_SHIFTED_TEST)
    shifted = RawImages(
        _shifted(raw.train_images, stream=0),
        np.tile(raw.train_labels, _SHIFT_COPIES),
        _shifted(raw.test_images, stream=1),
        np.tile(raw.test_labels, _SHIFT_COPIES),
    )
    return _normalized(shifted, classes=10, scale=16)


def _shifted(images: NDArray[np.uint8], *, stream: int) -> NDArray[np.uint8]:
    """Copies ``(4 N, 1, 12, 12)`` of images ``(N, 1, 8, 8)``, at random positions."""
    centered = F.pad(torch.from_numpy(images), [_SHIFT] * 4).repeat(_SHIFT_COPIES, 1, 1, 1)
    generator = epoch_generator(_SHIFT_SEED, stream, 0)
    offsets = torch.randint(0, 2 * _SHIFT + 1, (len(centered), 2), generator=generator)
    unflipped = torch.zeros(len(centered), dtype=torch.bool)
    return crop_and_flip(centered, offsets, unflipped, pad=_SHIFT).numpy()


def _digits(*, test: int) -> RawImages:
    datasets = import_extra("sklearn.datasets", "demo", "the digits data set")
    selection = import_extra("sklearn.model_selection", "demo", "the digits data set")
    digits = datasets.load_digits()
    images: NDArray[np.uint8] = digits.images.astype(np.uint8)[:, None]  # whole numbers, 0 to 16
    labels: NDArray[np.int64] = digits.target.astype(np.int64)
    train, rest = selection.train_test_split(
        np.arange(len(labels)), test_size=test, random_state=_SPLIT_SEED, stratify=labels
    )
    return RawImages(images[train], labels[train], images[rest], labels[rest])


def load_cifar10(folder: str | None) -> ImageData:
    """CIFAR-10: 50,000 + 10,000 images of 3 x 32 x 32.

    Args:
        folder: one of: a folder with the binary version (``data_batch_1.bin`` ...
            ``data_batch_5.bin``, ``test_batch.bin``), directly or in ``cifar-10-batches-bin/``; a
            folder with ``cifar10.npz``; an .npz file (uint8 ``x_train``, ``x_test`` of
            shape ``(N, 32, 32, 3)`` or ``(N, 3, 32, 32)``; integer ``y_train``, ``y_test``);
            the word ``hub`` (``./hub`` for a folder of that name); None: the value of the
            environment variable DYNARANK_DATA.

    Raises:
        DataError: if no location is given, or the data is missing, incomplete or damaged.
        ImportError: if ``hub`` is given without the ``data`` extra.

    """
    return _load(CIFAR10, "the binary version, cifar-10-binary.tar.gz unpacked", folder)


def load_cifar100(folder: str | None) -> ImageData:
    """CIFAR-100 with its 100 fine labels: 50,000 + 10,000 images of 3 x 32 x 32.

    Args:
        folder: as in :func:`load_cifar10`; the binary version is ``train.bin`` and ``test.bin``,
            directly or in ``cifar-100-binary/``, the .npz file is ``cifar100.npz``.

    Raises:
        DataError: if no location is given, or the data is missing, incomplete or damaged.
        ImportError: if ``hub`` is given without the ``data`` extra.

    """
    return _load(CIFAR100, "the binary version, cifar-100-binary.tar.gz unpacked", folder)


def load_fashion_mnist(folder: str | None) -> ImageData:
    """Fashion-MNIST: 60,000 + 10,000 images of 1 x 28 x 28.

    Args:
        folder: as in :func:`load_cifar10`; the four idx files, plain or as .gz, directly or in
            ``fashion-mnist/`` or ``FashionMNIST/raw/``, the .npz file is ``fashion-mnist.npz``.

    Raises:
        DataError: if no location is given, or the data is missing, incomplete or damaged.
        ImportError: if ``hub`` is given without the ``data`` extra.

    """
    return _load(FASHION_MNIST, "its four idx files", folder)


def _load(files: ImageFiles, standard: str, folder: str | None) -> ImageData:
    place = os.environ.get("DYNARANK_DATA", "") if folder is None else folder
    if not place:
        raise DataError(
            f"no location is given for {files.name} (DYNARANK_DATA is not set). As --data or "
            f"DYNARANK_DATA, pass (1) a folder with {standard}; (2) an .npz file with x_train, "
            "y_train, x_test, y_test; or (3) the word hub, to download it (needs "
            f"{install_command('data')})"
        )
    hub = place == "hub"
    raw = read_hub(files) if hub else read_files(files, Path(place).expanduser())
    return _normalized(raw, classes=files.classes, scale=255)


def limit(data: ImageData, train_limit: int) -> ImageData:
    """Keep ``train_limit`` training images and all test images.

    Images are taken in a fixed order that alternates between classes, so that classes are as
    balanced as possible, and smaller subsets are contained in larger ones. The normalization is
    still that of the full training set.

    Raises:
        ValueError: if ``train_limit`` is less than 1 or more than the number of images.

    """
    kept = _kept(data.train_labels, train_limit, "training")
    images, labels = data.train_images[kept], data.train_labels[kept]
    return replace(data, train_images=images, train_labels=labels)


def limit_test(data: ImageData, test_limit: int) -> ImageData:
    """Keep ``test_limit`` test images, chosen as in :func:`limit`, and all training images.

    Raises:
        ValueError: if ``test_limit`` is less than 1 or more than the number of images.

    """
    kept = _kept(data.test_labels, test_limit, "test")
    images, labels = data.test_images[kept], data.test_labels[kept]
    return replace(data, test_images=images, test_labels=labels)


def _kept(labels: torch.Tensor, count: int, which: str) -> torch.Tensor:
    """The positions of the ``count`` images to keep."""
    there = len(labels)
    if not 1 <= count <= there:
        raise ValueError(
            f"{count} {which} images requested, but there are {there}; request 1 to {there}"
        )
    return _dealt_order(labels.cpu())[:count].to(labels.device)


def _dealt_order(labels: torch.Tensor) -> torch.Tensor:
    """A fixed shuffle, then each class's first image, each class's second, ..."""
    generator = torch.Generator().manual_seed(_ORDER_SEED)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    turns = F.one_hot(shuffled).cumsum(0)  # (N, classes): the count of each class so far
    turn = turns.gather(1, shuffled[:, None]).squeeze(1)
    return order[turn.argsort(stable=True)]


def _normalized(raw: RawImages, *, classes: int, scale: int) -> ImageData:
    mean, std = _pixel_statistics(raw.train_images, floor=_STD_FLOOR * scale)
    return ImageData(
        train_images=_standardized(raw.train_images, mean, std),
        train_labels=torch.as_tensor(raw.train_labels),
        test_images=_standardized(raw.test_images, mean, std),
        test_labels=torch.as_tensor(raw.test_labels),
        classes=classes,
    )


def _pixel_statistics(
    images: NDArray[np.uint8], *, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each pixel, ``(C, H, W)``, from exact integer sums."""
    total = np.zeros(images.shape[1:], np.int64)
    squares = np.zeros_like(total)
    for start in range(0, len(images), _CHUNK):  # int64 takes 8 times the memory of the images
        chunk = images[start : start + _CHUNK].astype(np.int64)
        total += chunk.sum(0)
        squares += (chunk * chunk).sum(0)
    mean = total / len(images)
    std = np.sqrt(np.maximum(squares / len(images) - mean * mean, floor * floor))
    return torch.as_tensor(mean).float(), torch.as_tensor(std).float()


def _standardized(images: NDArray[np.uint8], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    out = torch.empty(images.shape, dtype=torch.float32)
    out.copy_(torch.as_tensor(images))
    return out.sub_(mean).div_(std)
