"""Changing forms by hand: low-rank, full-rank, adapted and plain again, on real digits.

Each change prints its effect on the model's output and its number of trainable parameters. Needs
scikit-learn (``pip install 'dynarank[demo]'``); runs in a few seconds on a CPU.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import dynarank as dr


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 64), standardized, and labels (N,)."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(digits.target)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, steps: int
) -> float:
    """Take some full-batch steps; return the last loss."""
    loss = torch.zeros(())
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main(steps: int) -> None:
    """Train a small network through every form."""
    torch.manual_seed(0)
    x, y = data()
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def report(verb: str, before: torch.Tensor) -> None:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        moved = ((model(x) - before).norm() / before.norm()).item()
        loss = train(model, optimizer, x, y, steps)
        print(f"{verb:<24} {trainable:>7,} trainable, output change {moved:.1e}, loss {loss:.4f}")

    report("full-rank", model(x).detach())
    changes = (
        ("factorize(rank=0.25)", lambda: dr.factorize(model, rank=0.25, optimizer=optimizer)),
        ("inflate()", lambda: dr.inflate(model, optimizer=optimizer)),
        ('deflate(to="adapted")', lambda: dr.deflate(model, to="adapted", optimizer=optimizer)),
        ('deflate(to="low-rank")', lambda: dr.deflate(model, to="low-rank", optimizer=optimizer)),
        ("merge()", lambda: dr.merge(model, optimizer=optimizer)),
    )
    for name, change in changes:
        before = model(x).detach()
        change()
        report(name, before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps in each form")
    main(parser.parse_args().steps)
