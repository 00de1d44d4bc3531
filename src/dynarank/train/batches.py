"""Mini-batches of tensors that are already on the device, in a reproducible order.

The order and augmentation of an epoch are a pure function of ``(seed, epoch)``: the same for every
rank schedule and device, and independent of other random draws. A run can resume at any step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from dynarank.train.draws import epoch_generator

__all__ = ["Batches", "crop_and_flip"]

PAD = 4
_ORDER, _AUGMENTATION = 0, 1  # independent random streams

Shuffle = Literal["epoch", "once"]


@dataclass(frozen=True, eq=False)
class _Draws:
    """The random draws of an epoch, by position in the epoch, on the images' device."""

    order: torch.Tensor  # (N,)
    offsets: torch.Tensor | None  # (N, 2)
    flips: torch.Tensor | None  # (N,)


class Batches:
    """A training set split into mini-batches; the incomplete last batch is dropped.

    Args:
        images: ``(N, C, H, W)``, on the device that trains.
        labels: ``(N,)``, on the same device.
        batch_size: the number of images per batch.
        seed: the seed of order and augmentation, not negative.
        shuffle: ``"epoch"`` draws a new order each epoch; ``"once"`` keeps the first epoch's, so
            that the same images are dropped each time (as in the method's published code).
        augment: random crops of the image padded with 4 zeros per side, and horizontal flips with
            probability 1/2.
        memory_format: the memory format of the images: ``torch.contiguous_format`` or
            ``torch.channels_last``.

    Raises:
        ValueError: if the arguments do not match.

    Example:
        >>> batches = Batches(torch.zeros(10, 1, 8, 8), torch.arange(10), 4, seed=0)
        >>> [tuple(images.shape) for images, labels in batches.epoch(0)]
        [(4, 1, 8, 8), (4, 1, 8, 8)]

    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        *,
        seed: int,
        shuffle: Shuffle = "epoch",
        augment: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        _check_tensors(images, labels)
        _check_options(len(images), batch_size, seed, shuffle)
        self.images, self.labels = images, labels
        self.batch_size, self.seed = batch_size, seed
        self.shuffle, self.augment = shuffle, augment
        self.memory_format = memory_format

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of one epoch: images ``(B, C, H, W)`` and labels ``(B,)``.

        Args:
            epoch: the epoch, counted from 0.
            start: the first batch, to resume within an epoch.

        Raises:
            ValueError: if ``epoch`` is negative or ``start`` is beyond the end of the epoch.

        """
        if epoch < 0:
            raise ValueError(f"epochs are counted from 0, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(
                f"start must be from 0 to the number of batches, {len(self)}, got {start}"
            )
        draws = self._draws(epoch)
        return (self._batch(draws, step) for step in range(start, len(self)))

    def _draws(self, epoch: int) -> _Draws:
        """The draws of an epoch: made on the CPU, so that all devices get the same, then moved."""
        count, device = len(self.images), self.images.device
        ordering = epoch_generator(self.seed, _ORDER, 0 if self.shuffle == "once" else epoch)
        order = torch.randperm(count, generator=ordering).to(device)
        if not self.augment:
            return _Draws(order, None, None)
        generator = epoch_generator(self.seed, _AUGMENTATION, epoch)
        offsets = torch.randint(0, 2 * PAD + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 2, (count,), generator=generator).bool()
        return _Draws(order, offsets.to(device), flips.to(device))

    def _batch(self, draws: _Draws, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = draws.order[rows]
        images, labels = self.images.index_select(0, chosen), self.labels.index_select(0, chosen)
        if draws.offsets is not None and draws.flips is not None:
            images = crop_and_flip(images, draws.offsets[rows], draws.flips[rows])
        return images.contiguous(memory_format=self.memory_format), labels


def crop_and_flip(
    images: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor, *, pad: int = PAD
) -> torch.Tensor:
    """Crop at an offset with zero padding, then flip horizontally.

    ``out[n, c, i, j] = padded[n, c, i + y_n, (W - 1 - j if flips[n] else j) + x_n]``

    Args:
        images: ``(N, C, H, W)``.
        offsets: ``(N, 2)``, integers ``(y, x)`` from 0 to ``2 * pad``; ``pad`` is the center.
        flips: ``(N,)``, bool.
        pad: the number of zeros added on each side.

    Returns:
        Images of the same shape, by one gather without a loop or a device synchronization.

    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))  # (N, C, H + 2 pad, W + 2 pad)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]  # (N, W)
    rows = torch.arange(height, device=images.device) + offsets[:, :1]  # (N, H)
    flat = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (N, H, W)
    index = flat.view(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(images.shape)


def _check_tensors(images: torch.Tensor, labels: torch.Tensor) -> None:
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            "images must be (N, C, H, W) and labels (N,), one per image, but they are "
            f"{tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if images.device != labels.device:
        raise ValueError(
            "images and labels must be on the same device, but they are on "
            f"{images.device} and {labels.device}; move one of them"
        )


def _check_options(count: int, batch_size: int, seed: int, shuffle: str) -> None:
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"batch_size must be from 1 to the number of images, {count}, got {batch_size}"
        )
    if seed < 0:
        raise ValueError(f"a seed must not be negative, got {seed}")
    if shuffle not in ("epoch", "once"):
        raise ValueError(f"shuffle must be 'epoch' or 'once', got {shuffle!r}")
