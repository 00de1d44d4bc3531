"""Automatic schedules: from the learning rate, for a FLOP budget, from the layers' spectra.

Three runs of one small network: the first derives its transition points from the learning rate, the
second fits a schedule to a share of the FLOPs, in the third each layer decides by its own rank
metrics and records why. It needs nothing but torch.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import dynarank as dr
from dynarank.schedules import closed_loop


def net() -> nn.Sequential:
    """Two scheduled layers and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 2)
    )


def train(name: str, schedule: dr.schedules.RankSchedule | None, steps: int) -> dr.RankScheduler:
    """Train under a schedule (None: one fitted to a budget) and print every change of form."""
    model, x = net(), torch.randn(256, 64)
    y = (x[:, :32].sum(1) > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lr_scheduler = CosineAnnealingLR(optimizer, steps)
    options = {"layers": ["0", "2"], "lr_scheduler": lr_scheduler}  # a copy of it is run ahead
    if schedule is None:  # 60% of the training FLOPs of full rank, counted on a batch
        schedule = dr.fit_schedule(model, x[:32], steps, flops=0.6, **options)
    ranks = dr.RankScheduler(model, optimizer, schedule, steps, **options)
    for step in range(steps):
        rows = slice(step % 8 * 32, step % 8 * 32 + 32)
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        lr_scheduler.step()
        for change in ranks.step():
            print(
                f"{name}, step {step + 1}: layer {change.path}: {change.before} -> {change.after}"
            )
        optimizer.zero_grad()
    return ranks


def main(steps: int) -> None:
    """Run all three."""
    train("learning rate", dr.schedules.dynamic_rank(0.25), steps)
    ranks = train("budget", None, steps)
    print(f"budget 0.6: chosen {ranks.schedule}")
    ranks = train("closed loop", closed_loop(0.25, to="low-rank"), steps)
    for decision in ranks.decisions:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in decision.readings.items())
        print(f"step {decision.step}, layer {decision.path}: {decision.reason} ({figures})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
