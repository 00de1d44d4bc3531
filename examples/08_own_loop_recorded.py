"""A loop of one's own with a forecast of its cost before, and records and a report after it.

``dr.estimate`` prints what each phase will cost; ``dr.Recorder`` writes what ``dynarank train``
writes. Run it twice: an unfinished run goes on from its last checkpoint. Needs scikit-learn and
matplotlib (``pip install 'dynarank[demo]'``); runs in a few seconds on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import dynarank as dr


def main() -> None:
    """Train on the handwritten digits of scikit-learn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/digits-loop"))
    options = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    train, test = slice(0, 1440), slice(1440, None)
    batches = list(zip(x[train].split(32), y[train].split(32), strict=True))
    steps = options.epochs * len(batches)

    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    how = {"lr_scheduler": lr_scheduler, "lr_every": len(batches)}  # stepped once an epoch
    schedule = dr.schedules.dynamic_rank(rank=0.25)
    print(dr.estimate(model, batches[0], schedule=schedule, total_steps=steps,
                      optimizer=optimizer, **how))  # fmt: skip

    ranks = dr.RankScheduler(model, optimizer, schedule, steps, **how)
    parts = {"model": model, "optimizer": optimizer, "ranks": ranks, "lr_scheduler": lr_scheduler}
    checkpoint, done = options.folder / "checkpoint", 0
    if checkpoint.exists():
        done = dr.load(checkpoint, **parts)["epoch"]

    with dr.Recorder(options.folder, ranks, metric="accuracy", seed=0) as recorder:
        for epoch in range(done, options.epochs):
            for inputs, targets in batches:
                loss = F.cross_entropy(model(inputs), targets)
                loss.backward()
                optimizer.step()
                ranks.step()
                optimizer.zero_grad()
                recorder.log(loss=loss)
            lr_scheduler.step()
            with torch.no_grad():
                logits = model(x[test])
            accuracy = (logits.argmax(-1) == y[test]).float().mean()
            test_loss = F.cross_entropy(logits, y[test])
            recorder.epoch(test_loss=test_loss, test_score=accuracy)
            dr.save(checkpoint, **parts, extra={"epoch": epoch + 1})


if __name__ == "__main__":
    main()
