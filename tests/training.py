"""What tests of training share: a listener that says nothing, and images that are noise."""

from __future__ import annotations

import torch

from dynarank.forms import Change
from dynarank.records import EpochRecord
from dynarank.train.data import ImageData
from dynarank.train.listener import Progress


class Silent:
    def step(self, progress: Progress) -> None: ...
    def changed(self, epochs_done: float, changes: list[Change]) -> None: ...
    def epoch(self, record: EpochRecord) -> None: ...


def images(count: int) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 32, 32, generator=generator)
    y = torch.arange(count) % 10
    return ImageData(x, y, x[:10], y[:10], 10)
