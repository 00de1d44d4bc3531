"""Dynamic rank in a plain training loop: one extra line, ``ranks.step()``.

A small convolutional network on real digits: low-rank, full-rank through the learning rate's decay,
then low-rank again. Needs scikit-learn (``pip install 'dynarank[demo]'``).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, TensorDataset

import dynarank as dr


def loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Return training and test batches of images (N, 1, 8, 8)."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    train, test = TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(test, 397)


def network() -> nn.Sequential:
    """Return three convolutions and a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Return the share of test images that are classified correctly."""
    model.eval()
    hits = [(model(x).argmax(1) == y).float().mean().item() for x, y in loader]
    model.train()
    return sum(hits) / len(hits)


def main(epochs: int) -> None:
    """Train, and print every change of form."""
    torch.manual_seed(0)
    train, test = loaders(64)
    model = dr.factorize(network(), rank=0.25, layers=["3", "6"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lr_scheduler = MultiStepLR(optimizer, [2 * epochs // 3, 7 * epochs // 8])
    schedule = dr.schedules.dynamic_rank(rank=0.25, inflate=0.37, deflate=0.80, to="low-rank")
    ranks = dr.RankScheduler(model, optimizer, schedule, total_steps=epochs * len(train))
    for epoch in range(epochs):
        for x, y in train:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            for change in ranks.step():
                print(f"epoch {epoch}: layer {change.path}: {change.before} -> {change.after}")
            optimizer.zero_grad()
        lr_scheduler.step()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"epoch {epoch}: test accuracy {accuracy(model, test):.2%}, {trainable:,} trainable")
    dr.merge(model)  # plain nn modules again, ready to deploy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    main(parser.parse_args().epochs)
