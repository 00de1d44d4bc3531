"""Mini-batches of tensors that are already on the device, in a reproducible order.

An epoch's order and augmentation are a pure function of ``(seed, epoch)``: the same for every rank
schedule and device, whatever else draws random numbers; a run can resume at any step.
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
    """The random choices of an epoch, by position in the epoch, on the images' device."""

    order: torch.Tensor  # (N,)
    offsets: torch.Tensor | None  # (N, 2)
    flips: torch.Tensor | None  # (N,)


class Batches:
    """A training set split into mini-batches; the incomplete last batch is dropped.

    Args:
        images: ``(N, C, H, W)``, on the device that trains.
        labels: ``(N,)``, on the same device.
        batch_size: images a batch.
        seed: not negative; with the epoch it decides order and augmentation.
        shuffle: ``"epoch"`` draws a new order each epoch; ``"once"`` keeps the first epoch's, so
            that the same images are left over each time (as in the method's published code).
        augment: crop at random out of the image padded with 4 zeros a side, and mirror every
            other image, at random.
        memory_format: of the batches of images: ``torch.contiguous_format`` or
            ``torch.channels_last``.

    Raises:
        ValueError: if the arguments do not fit each other.

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
        """Count the batches of an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Cut one epoch into batches: images ``(B, C, H, W)`` and labels ``(B,)``.

        Args:
            epoch: counted from 0.
            start: the batch to begin with, to resume within an epoch.

        Raises:
            ValueError: if ``epoch`` is negative or ``start`` is beyond the epoch's end.

        """
        if epoch < 0:
            raise ValueError(f"epoch {epoch} was asked for; epochs are counted from 0")
        if not 0 <= start <= len(self):
            raise ValueError(
                f"batch {start} was asked for as the first; an epoch has {len(self)}: "
                f"ask for 0 to {len(self)}"
            )
        draws = self._draws(epoch)
        return (self._batch(draws, step) for step in range(start, len(self)))

    def _draws(self, epoch: int) -> _Draws:
        """Drawn on the CPU, so that all devices get the same; moved once per epoch."""
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
    """Random crop with zero padding, then random horizontal flip.

    ``out[n, c, i, j] = padded[n, c, i + y_n, (W - 1 - j if flips[n] else j) + x_n]``

    Args:
        images: ``(N, C, H, W)``.
        offsets: ``(N, 2)``, integers ``(y, x)`` from 0 to ``2 * pad``; ``pad`` is the middle.
        flips: ``(N,)``, bool.
        pad: zeros added on each side.

    Returns:
        Images of the same shape, in one gather: no loop over images, no wait for the device.

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
            "images must be (N, C, H, W) and labels (N,), one an image, but they are "
            f"{tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if images.device != labels.device:
        raise ValueError(
            "images and labels must be on one device, but they are on "
            f"{images.device} and {labels.device}: move one"
        )


def _check_options(count: int, batch_size: int, seed: int, shuffle: str) -> None:
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"batches of {batch_size} were asked for out of {count} images: ask for 1 to {count}"
        )
    if seed < 0:
        raise ValueError(f"seed {seed} was asked for; a seed must not be negative")
    if shuffle not in ("epoch", "once"):
        raise ValueError(f"shuffle must be 'epoch' or 'once', but is {shuffle!r}")
