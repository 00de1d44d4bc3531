"""A custom rank schedule, and its cost before training.

A schedule is a function ``(clock, readings) -> plan``. This one follows Pufferfish (Wang et al.,
arXiv 2103.03936): full-rank for the first fifth of the run, then low-rank, with the smallest ranks
for the widest layers. It needs nothing but torch.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import dynarank as dr
from dynarank.cost.flops import trace
from dynarank.cost.schedule import cost_schedule


def warm_then_low(clock: dr.schedules.Clock, readings: dr.schedules.Readings) -> dict[str, object]:
    """Return full rank for a fifth of the run, then a share of each layer's own cost."""
    if clock.progress < 0.2:
        return dict.fromkeys(readings.layers, dr.FullRank())
    return {
        path: dr.LowRank(0.25 if max(shape) > 256 else 0.5)
        for path, shape in readings.layers.items()
    }


def main(steps: int) -> None:
    """Print the cost of the schedule, then run it on random data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128), nn.GELU(), nn.Linear(128, 2)
    )
    layers, x = ["0", "2"], torch.randn(64, 128)
    cost = cost_schedule(trace(model, x), warm_then_low, layers, steps)
    for phase in cost.phases:
        print(
            f"steps {phase.phase.start} to {phase.phase.stop}: {phase.trainable_parameters:,} "
            f"trainable, {phase.relative_training:.3f} of full-rank training FLOPs"
        )
    print(f"whole run: {cost.relative_training:.3f}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ranks = dr.RankScheduler(model, optimizer, warm_then_low, steps, layers=layers)
    y = (x.sum(1) > 0).long()
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for change in ranks.step():
            print(
                f"step {step}: layer {change.path}: {change.after}, weight error {change.error:.2f}"
            )
    print(f"loss {loss.item():.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
