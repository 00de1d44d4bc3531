"""A recipe of your own: `dynarank train 10_your_own_recipe.py` trains it, and so does this file.

Data with a random transform, a network, a metric and a rank schedule, each a function or class;
`dynarank plan`, `probe`, `compare` and `sweep` take the file too.
"""

import torch
from torch import nn
from torch.utils.data import Dataset

import dynarank as dr


class Waves(Dataset):
    """Sines of 4 frequencies, at a random phase whenever one is read."""

    def __init__(self, count):
        self.labels = torch.arange(count) % 4

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        time = torch.linspace(0, 6.28, 32)
        wave = torch.sin((1 + self.labels[index]) * time + 6.28 * torch.rand(()))
        return wave + 0.3 * torch.randn(32), self.labels[index]


def data(count):
    """Training and test set; `count` is of data_options."""
    return Waves(count), Waves(count // 4)


class Network(nn.Module):
    """An MLP; its inputs and classes are those of the data."""

    def __init__(self, inputs, classes, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.layers(x))


def worst_class(output, target):
    """The accuracy on the class that is recognized least."""
    right = (output.argmax(1) == target).float()
    return min(right[target == label].mean() for label in target.unique())


def halfway(clock, readings):
    """Full rank, then a quarter of each layer's cost for the second half."""
    form = dr.FullRank() if clock.progress < 0.5 else dr.LowRank(0.25)
    return dict.fromkeys(readings.layers, form)


recipe = {
    "data": data,
    "data_options": {"count": 512},
    "model": Network,
    "metric": worst_class,
    "higher_is_better": True,
    "optimizer": torch.optim.AdamW,
    "schedules": ["full-rank", "low-rank", halfway],
    "rank": 0.25,
    "epochs": 8,
    "batch_size": 32,
    "learning_rate": 0.003,
}

if __name__ == "__main__":
    import sys

    from dynarank.cli import main

    sys.argv = ["dynarank", "train", __file__, *sys.argv[1:]]
    main()
