"""The problems: a network, its data, loss, optimizer, learning rate and test.

The batches depend on seed and step only, so that all arms of a seed train on the same ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from networks import MLP, ResNet, ViT
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from dynarank.train.gpt import GPT
from dynarank.train.idx_files import read_idx


class Problem(ABC):
    """A network to train for ``steps`` steps; ``layers`` change form.

    ``rate`` is the learning rate of the published set-up of full rank; arms multiply it.
    """

    layers: str
    metric: str  # of the test: "accuracy" (%) or "loss"
    rate: float
    steps: int
    batch_size: int
    bf16 = False

    @abstractmethod
    def network(self) -> nn.Module:
        """Make the network."""

    @abstractmethod
    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step."""

    @abstractmethod
    def test(self, model: nn.Module) -> dict[str, float]:
        """Test loss, and accuracy if there is one."""

    def model(self, seed: int) -> nn.Module:
        """The initial model of a seed."""
        torch.manual_seed(1000 + seed)
        return self.network()

    def optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """The optimizer."""
        return AdamW(model.parameters(), lr=rate, weight_decay=0.05, fused=True)

    def warmup_then(self, step: int, last: float) -> float:
        """5% linear warm-up, then a cosine down to ``last``: a factor of the rate."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / (self.steps - warmup)
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))

    def factor(self, step: int) -> float:
        """The learning rate of a step, relative to the peak."""
        return self.warmup_then(step, 0.01)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The training loss."""
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext():
            output = model(batch[0])
        return F.cross_entropy(output.float().flatten(0, -2), batch[1].flatten())

    def inputs(self, seed: int, batches: int = 32) -> Iterable[Tensor]:
        """Inputs of a few training batches, to calibrate on."""
        return [self.batch(seed, step)[0] for step in range(batches)]


class Images(Problem):
    """Image classification on data in memory, a permutation an epoch."""

    metric = "accuracy"
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def indices(self, seed: int, step: int) -> Tensor:
        """The images of a step's batch."""
        epoch, place = divmod(step, len(self.x) // self.batch_size)
        order = _order(len(self.x), seed * 100_003 + epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step."""
        chosen = self.indices(seed, step)
        return self.x[chosen], self.y[chosen]

    @torch.no_grad()
    def test(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy (%)."""
        model.eval()
        loss, right = 0.0, 0
        for x, y in zip(self.test_x.split(500), self.test_y.split(500), strict=True):
            with torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext():
                output = model(x).float()
            loss += F.cross_entropy(output, y, reduction="sum").item()
            right += int((output.argmax(1) == y).sum())
        model.train()
        return {"loss": loss / len(self.test_y), "accuracy": 100 * right / len(self.test_y)}


class Fashion(Images):
    """An MLP on 20,000 images of Fashion-MNIST, 8 epochs."""

    layers, batch_size = "body.*", 128

    def __init__(self, data: Path, width: int, rate: float) -> None:
        self.width, self.rate = width, rate
        images, labels = (
            [_idx(data / "fashion-mnist", f"{part}-{kind}") for part in ("train", "t10k")]
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        self.x, self.test_x = images[0][:20_000].float(), images[1].float()
        self.x, self.test_x = ((x / 255 - 0.286) / 0.353 for x in (self.x, self.test_x))
        self.y, self.test_y = labels[0][:20_000].long(), labels[1].long()
        self.steps = 8 * (len(self.x) // self.batch_size)

    def network(self) -> nn.Module:
        """784-w-w-w-10."""
        return MLP(784, self.width, 10)


class Cifar(Images):
    """10,000 images of CIFAR-10 at 16 x 16, flipped and shifted by up to 2 pixels."""

    batch_size, bf16 = 128, True
    epochs: int

    def __init__(self, data: Path, images: int = 10_000) -> None:
        folder = data / "cifar-10-batches-bin"
        self.x, self.y = _cifar(folder / "data_batch_1.bin", images)
        self.test_x, self.test_y = _cifar(folder / "test_batch.bin", 10_000)
        self.steps = self.epochs * (len(self.x) // self.batch_size)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step, augmented."""
        chosen = self.indices(seed, step)
        x, n, size = self.x[chosen], len(chosen), self.x.shape[-1]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        flipped = torch.rand(n, generator=generator) < 0.5
        x = F.pad(torch.where(flipped[:, None, None, None], x.flip(-1), x), (2, 2, 2, 2))
        rows, columns = torch.randint(0, 5, (2, n, 1), generator=generator) + torch.arange(size)
        every, channels = torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None]
        x = x[every, channels, rows[:, None, :, None], columns[:, None, None, :]]
        return x.contiguous(memory_format=torch.channels_last), self.y[chosen]


class CifarResNet(Cifar):
    """A ResNet, SGD with steps at 60% and 85%."""

    layers, rate = "stages.*conv*", 0.2

    def __init__(self, data: Path, width: int, blocks: int, epochs: int) -> None:
        self.width, self.blocks, self.epochs = width, blocks, epochs
        super().__init__(data)

    def network(self) -> nn.Module:
        """Stages of w, 2 w, 4 w channels, in channels_last."""
        network = ResNet(self.width, self.blocks)
        return network.to(memory_format=torch.channels_last)  # pyright: ignore

    def optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """SGD."""
        return SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def factor(self, step: int) -> float:
        """Half an epoch of warm-up, then steps."""
        warmup, done = len(self.x) // self.batch_size // 2, step / self.steps
        if step < warmup:
            return (step + 1) / warmup
        return 1 if done < 0.6 else 0.1 if done < 0.85 else 0.01


class CifarViT(Cifar):
    """A ViT: patches of 2 x 2, width 96, 4 blocks, 12 epochs."""

    layers, rate, epochs = "blocks.*", 0.002, 12

    def network(self) -> nn.Module:
        """64 tokens of width 96."""
        return ViT(16, 96, 4, 4)


class Language(Problem):
    """A small GPT on the characters of tinyshakespeare; the last 100,000 are the test."""

    layers, metric, batch_size, context = "blocks.*", "loss", 32, 64

    def __init__(self, data: Path, width: int, depth: int, steps: int, rate: float) -> None:
        self.width, self.depth, self.steps, self.rate = width, depth, steps, rate
        text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
        self.characters = sorted(set(text))
        place = {character: i for i, character in enumerate(self.characters)}
        tokens = torch.tensor([place[character] for character in text])
        self.train, self.held_out = tokens[:-100_000], tokens[-100_000:]

    def network(self) -> nn.Module:
        """A GPT with 4 heads and a context of 64."""
        size = len(self.characters)
        return GPT(size, self.context, width=self.width, depth=self.depth, heads=4)

    def optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """AdamW; only the matrices of the blocks decay."""
        named = dict(model.named_parameters())
        matrices = [p for k, p in named.items() if p.ndim == 2 and k.startswith("blocks")]
        others = [p for k, p in named.items() if not (p.ndim == 2 and k.startswith("blocks"))]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        return AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True)

    def factor(self, step: int) -> float:
        """5% of warm-up, then a cosine."""
        return self.warmup_then(step, 0.02)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Random windows of the text."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        last = len(self.train) - self.context - 1
        starts = torch.randint(0, last, (self.batch_size,), generator=generator)
        windows = self.train[starts[:, None] + torch.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]

    @torch.no_grad()
    def test(self, model: nn.Module) -> dict[str, float]:
        """The mean loss of a character."""
        model.eval()
        n = (len(self.held_out) - 1) // self.context * self.context
        x = self.held_out[:n].view(-1, self.context)
        y = self.held_out[1 : n + 1].view(-1, self.context)
        pairs = zip(x.split(128), y.split(128), strict=True)
        total = sum(self.loss(model, pair).item() * len(pair[0]) for pair in pairs)
        model.train()
        return {"loss": total / len(x)}


@lru_cache(maxsize=1)
def _order(images: int, seed: int) -> Tensor:
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed))


def _idx(folder: Path, name: str) -> Tensor:
    path = next(path for path in (folder / name, folder / f"{name}.gz") if path.exists())
    return torch.from_numpy(read_idx(path).copy())


def _cifar(path: Path, images: int) -> tuple[Tensor, Tensor]:
    """Images at 16 x 16, normalized, in channels_last, and labels."""
    records = np.fromfile(path, np.uint8).reshape(-1, 3073)[:images]
    x = F.avg_pool2d(torch.from_numpy(records[:, 1:]).view(-1, 3, 32, 32) / 255, 2)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.4914, 0.4822, 0.4465), (0.23, 0.23, 0.24))
    )
    x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
    return x, torch.from_numpy(records[:, 0].astype(np.int64))


PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "fash": partial(Fashion, width=256, rate=0.002),
    "fash1024": partial(Fashion, width=1024, rate=0.001),
    "lm2": partial(Language, width=64, depth=2, steps=800, rate=0.012),
    "lmw": partial(Language, width=128, depth=3, steps=1000, rate=0.008),
    "vis2": partial(CifarResNet, width=16, blocks=2, epochs=12),
    "visw": partial(CifarResNet, width=32, blocks=2, epochs=10),
    "vit": CifarViT,
}
"""By name, a function from the folder of the data to the problem."""
