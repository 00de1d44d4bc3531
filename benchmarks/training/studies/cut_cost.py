"""What does a cut of a whole model cost: calibrated, ranks found for a budget, optimizer moved?

An MLP 784-W-W-W-10 with AdamW takes steps of 128 images, and then copies of it are cut. Steps and
cuts are interleaved, on one thread, in CPU seconds; the medians of --rounds are printed in seconds
and in training steps.

OMP_NUM_THREADS=1 python benchmarks/training/studies/cut_cost.py --width 1024 --flops 0.22
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynarank as dr
from dynarank.cost.flops import trace


def network(width: int) -> nn.Module:
    """The MLP, with three layers to cut."""
    inner = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), *inner, nn.Linear(width, 10))


def images(number: int) -> list[Tensor]:
    """Batches with the falling spectrum of images."""
    mix = torch.randn(784, 784) * torch.arange(1.0, 785)[:, None] ** -0.7
    return [torch.randn(128, 784) @ mix for _ in range(number)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """A training step on targets that depend on the images."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), x[:, :10].argmax(1)).backward()
    optimizer.step()


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    """Add the CPU seconds of a block."""
    start = time.process_time()
    yield
    times.append(time.process_time() - start)


def main() -> None:
    """Interleave steps and cuts, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--flops", type=float, default=0.22)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fused", action="store_true", help="fused AdamW, whose steps are faster")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batches = network(arguments.width), images(8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=arguments.fused)
    for i in range(50):
        step(model, optimizer, batches[i % 8])
    use = trace(model, batches[0])
    seconds: dict[str, list[float]] = {k: [] for k in ("step", "calibrate", "plan", "apply")}
    for _ in range(arguments.rounds):
        for x in batches:
            with timed(seconds["step"]):
                step(model, optimizer, x)
        twin, other = copy.deepcopy((model, optimizer))
        with timed(seconds["calibrate"]):
            known = dr.calibrate(twin, batches)
        with timed(seconds["plan"]):
            plan = dr.plan_within(twin, use=use, flops=arguments.flops, calibration=known)
        with timed(seconds["apply"]):
            dr.apply_plan(twin, plan, optimizer=other, calibration=known)
    print({path: getattr(form, "rank", "full") for path, form in plan.items()})
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, median in medians.items():
        print(f"{name:10} {median:8.4f} s {median / medians['step']:8.1f} steps")
    whole = sum(medians.values()) - medians["step"]
    print(f"{'cut':10} {whole:8.4f} s {whole / medians['step']:8.1f} steps")


if __name__ == "__main__":
    main()
