"""Image classification: an MLP and a ResNet on Fashion-MNIST, a ResNet and a ViT on CIFAR-10."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.training.problems.networks import MLP, ResNet, ViT
from benchmarks.training.problems.problem import Batch
from benchmarks.training.problems.rows import Rows
from dynarank.train.idx_files import read_idx
from dynarank.train.wide_resnet import WideResNet


class StepDecay(Rows):
    """SGD with Nesterov momentum, half an epoch of warm-up, a tenth of the rate at two times."""

    rate, bf16, weight_decay = 0.2, True, 5e-4
    _drops = (0.6, 0.85)

    def optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """SGD."""
        settings = {"momentum": 0.9, "nesterov": True, "weight_decay": self.weight_decay}
        return SGD(model.parameters(), lr=rate, **settings)

    def factor(self, step: int) -> float:
        """The learning rate of a step, relative to the peak."""
        warmup, done = self.epoch_steps // 2, step / self.steps
        if step < warmup:
            return (step + 1) / warmup
        return (1, 0.1, 0.01)[sum(done >= drop for drop in self._drops)]


class FashionMLP(Rows):
    """784-w-w-w-10 on 20,000 images of Fashion-MNIST."""

    layers = "body.*"

    def __init__(
        self,
        data: Path,
        width: int = 256,
        rate: float = 0.002,
        epochs: int = 8,
        calibrated_on: int = 32,
    ) -> None:
        self.width, self.rate, self.calibrated_on = width, rate, calibrated_on
        super().__init__(fashion(data, 20_000), epochs)

    def network(self, width: float = 1.0) -> nn.Module:
        """784-w-w-w-10."""
        return MLP(784, round(self.width * width), 10)


class FashionResNet(StepDecay):
    """A ResNet-8 (16-32-64 channels) on 10,000 images of Fashion-MNIST at 14 x 14."""

    layers = "stages.*conv*"

    def __init__(self, data: Path, epochs: int = 8) -> None:
        parts = fashion(data, 10_000)
        super().__init__({k: (F.avg_pool2d(x, 2), y) for k, (x, y) in parts.items()}, epochs)

    def network(self, width: float = 1.0) -> nn.Module:
        """Stages of 16, 32, 64 channels, in channels_last."""
        network = ResNet(round(16 * width), 1, inputs=1)
        return network.to(memory_format=torch.channels_last)  # pyright: ignore


class Cifar(Rows):
    """CIFAR, flipped and shifted.

    Args:
        parts: images and labels of each part.
        epochs: the length of the training.
    """

    bf16, calibrated_on = True, 8

    def __init__(self, parts: Mapping[str, tuple[Tensor, Tensor]], epochs: int) -> None:
        self.shift = parts["train"][0].shape[-1] // 8
        super().__init__(parts, epochs)

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of a step, augmented."""
        images, labels = self.parts["train"]
        chosen, s = self.indices(seed, step), self.shift
        x, n, size = images[chosen], len(chosen), images.shape[-1]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        flipped = torch.rand(n, generator=generator) < 0.5
        x = F.pad(torch.where(flipped[:, None, None, None], x.flip(-1), x), (s, s, s, s))
        offsets = torch.randint(0, 2 * s + 1, (2, n, 1), generator=generator)
        rows, columns = offsets + torch.arange(size)
        every, channels = torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None]
        x = x[every, channels, rows[:, None, :, None], columns[:, None, None, :]]
        return x.contiguous(memory_format=torch.channels_last), labels[chosen]


class CifarResNet(Cifar, StepDecay):
    """A ResNet of three stages on CIFAR-10.

    Args:
        data: the folder of the data sets.
        blocks: residual blocks a stage; the depth is 6 blocks + 2.
        images: how many training images.
        size: pixels of a side; images are averaged down to it.
        epochs: the length of the training.
    """

    layers = "stages.*conv*"

    def __init__(
        self, data: Path, blocks: int = 2, images: int = 10_000, size: int = 16, epochs: int = 12
    ) -> None:
        self.blocks = blocks
        super().__init__(cifar10(data, images, size), epochs)

    def network(self, width: float = 1.0) -> nn.Module:
        """Stages of 16, 32, 64 channels, in channels_last."""
        network = ResNet(round(16 * width), self.blocks)
        return network.to(memory_format=torch.channels_last)  # pyright: ignore


class CifarResNetAsPublished(CifarResNet):
    """A ResNet on CIFAR-10 whose learning rate falls where it does in the paper's code."""

    _drops = (100 / 150, 130 / 150)


class CifarViT(Cifar):
    """A ViT on 10,000 images of CIFAR-10 at 16 x 16: patches of 4 x 4, width 96, 4 blocks."""

    layers, rate = "blocks.*", 0.002

    def __init__(self, data: Path, epochs: int = 12) -> None:
        super().__init__(cifar10(data, 10_000, 16), epochs)

    def network(self, width: float = 1.0) -> nn.Module:
        """16 tokens of width 96, 4 heads."""
        return ViT(16, 4 * round(24 * width), 4, 4)


class Cifar100WRN(Cifar, StepDecay):
    """WRN-16-4 on all of CIFAR-100, as in the published code but for its size.

    Args:
        data: the folder of the data sets.
        size: pixels of a side; images are averaged down to it.
        epochs: the length of the training.
    """

    layers, rate = "*conv*", 0.1

    def __init__(self, data: Path, size: int = 32, epochs: int = 12) -> None:
        super().__init__(cifar100(data, size), epochs)

    def network(self, width: float = 1.0) -> nn.Module:
        """WRN-16-4 or less wide, without dropout, in channels_last."""
        network = WideResNet(16, round(4 * width), classes=100, dropout=0.0)
        return network.to(memory_format=torch.channels_last)  # pyright: ignore


def fashion(data: Path, images: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Fashion-MNIST, normalized: the first images to train on, the last 5,000 to validate."""

    def read(part: str) -> tuple[Tensor, Tensor]:
        x, y = (_idx(data / "fashion-mnist", f"{part}-{kind}") for kind in _KINDS)
        return ((x.float() / 255 - 0.286) / 0.353)[:, None], y.long()

    x, y = read("train")
    return {
        "train": (x[:images], y[:images]), "valid": (x[-5000:], y[-5000:]), "test": read("t10k"),
    }  # fmt: skip


_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def _idx(folder: Path, name: str) -> Tensor:
    packed = folder / f"{name}.gz"
    return torch.from_numpy(read_idx(packed if packed.exists() else folder / name).copy())


def cifar10(data: Path, images: int, size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """CIFAR-10: the first images, at most 48,000, to train on, the last 2,000 to validate."""
    if images > 48_000:
        raise ValueError(f"{images} images to train on, at most 48,000: 2,000 are to tune on")
    folder = data / "cifar-10-batches-bin"
    batches = (images - 1) // 10_000 + 1
    train = [_cifar(folder / f"data_batch_{i + 1}.bin", size) for i in range(batches)]
    x, y = (torch.cat(parts)[:images] for parts in zip(*train, strict=True))
    held_x, held_y = _cifar(folder / "data_batch_5.bin", size)
    x = x.contiguous(memory_format=torch.channels_last)
    return {
        "train": (x, y), "valid": (held_x[-2000:], held_y[-2000:]),
        "test": _cifar(folder / "test_batch.bin", size),
    }  # fmt: skip


def cifar100(data: Path, size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """CIFAR-100 with its fine labels: 48,000 images to train on, 2,000 to validate."""
    x, y = _cifar(data / "cifar-100-binary" / "train.bin", size, labels=2)
    return {
        "train": (x[:48_000], y[:48_000]), "valid": (x[48_000:], y[48_000:]),
        "test": _cifar(data / "cifar-100-binary" / "test.bin", size, labels=2),
    }  # fmt: skip


def _cifar(path: Path, size: int, labels: int = 1) -> tuple[Tensor, Tensor]:
    """Images of a size, normalized, in channels_last, and the last of their labels."""
    records = np.fromfile(path, np.uint8).reshape(-1, 3072 + labels)
    pixels = torch.from_numpy(records[:, labels:]).view(-1, 3, 32, 32) / 255
    x = F.avg_pool2d(pixels, 32 // size)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.4914, 0.4822, 0.4465), (0.23, 0.23, 0.24))
    )
    x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
    return x, torch.from_numpy(records[:, labels - 1].astype(np.int64))
