"""Small recipes of a user's own, written into a folder: their TOML, and the code they name."""

from __future__ import annotations

from pathlib import Path

from dynarank.train.recipes import Recipe, load_recipe

CODE = '''
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data import WeightedRandomSampler

import dynarank as dr

SIDE = 24


class Net(nn.Module):
    def __init__(self, inputs, classes, width=SIDE, dropout=0.2):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.hidden = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.norm(self.drop(self.hidden(self.first(x).relu()).relu())))


class Labeled(Net):
    """As a network of transformers: the loss comes with the targets."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def points(count=72, seed=0):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


def tensors():
    return points(), points(20, 1)


def arrays():
    return tuple(tuple(v.numpy() for v in points(n, n)) for n in (72, 20))


def dicts():
    return {"train": dict(zip("xy", points())), "val": dict(zip("xy", points(20, 1)))}


def labeled():
    return tuple(dict(zip(("x", "labels"), points(n, n))) for n in (72, 20))


def datasets():
    return TensorDataset(*points()), TensorDataset(*points(20, 1))


class Noisy(Dataset):
    """Every item draws from all three generators."""

    def __init__(self, count):
        self.x, self.y = points(count, count)
        self.classes = ["a", "b", "c"]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.randn(8) + random.random() + float(np.random.rand())
        return self.x[index] + 0.1 * noise, self.y[index]


def noisy():
    return Noisy(72), Noisy(20)


def listed():
    return [list(zip(*points())), list(zip(*points(20, 1)))]


def loaders(batch_size):
    return DataLoader(Noisy(72), batch_size, shuffle=True), DataLoader(Noisy(20), 7)


def weighted():
    sampler = WeightedRandomSampler(torch.arange(72) + 1.0, 72)
    return DataLoader(Noisy(72), 12, sampler=sampler), DataLoader(Noisy(20), 7)


class Stream(IterableDataset):
    classes = ["a", "b", "c"]

    def __iter__(self):
        while True:
            x = torch.randn(8) + random.random()
            yield x, x[:3].argmax()


def streams():
    return Stream(), Noisy(20)


def margin(output, target):
    return (output.gather(1, target[:, None])[:, 0] - 1).square().mean()


def worst(output, target):
    return (output.argmax(1) != target).float().mean()


def lion(params, lr, scale=1.0):
    return torch.optim.Adagrad(params, lr=lr * scale)


def halved(optimizer, total_steps):
    return torch.optim.lr_scheduler.StepLR(optimizer, total_steps // 2, 0.5)


def late(rank):
    return dr.schedules.dynamic_rank(rank=rank, inflate=0.3, deflate=0.6)


def by_clock(clock, readings):
    form = dr.LowRank(4) if clock.progress < 0.5 else dr.FullRank()
    return dict.fromkeys(readings.layers, form)
'''

TOML = """
data = "net.py:{data}"
model = "net.py:Net"
epochs = 2
learning_rate = 0.05
{more}
"""


def write(
    folder: Path, data: str = "tensors", more: str = "batch_size = 12", code: str = ""
) -> Path:
    """Write ``my.toml`` and ``net.py``; the path of the first."""
    (folder / "net.py").write_text(CODE + code)
    path = folder / "my.toml"
    path.write_text(TOML.format(data=data, more=more))
    return path


def own(
    folder: Path, data: str = "tensors", more: str = "batch_size = 12", code: str = ""
) -> Recipe:
    """The recipe of a folder that is written first."""
    return load_recipe(str(write(folder, data, more, code)))
