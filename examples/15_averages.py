"""A plain loop with accumulation, a gradient scaler and an average of the weights (EMA).

The average goes through every change of form with the model, the steps that the scaler skips are
not counted, and the run goes on from a folder as if it had not been interrupted. Needs
scikit-learn (``pip install 'dynarank[demo]'``); runs in a few seconds on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dynarank as dr

ACCUMULATE, SKIPPED = 2, 3  # micro-batches a step; the step whose gradients overflow
Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Digits:
    """Training and test images, each with its labels."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    return x[:1400], y[:1400], x[1400:], y[1400:]


class Run:
    """Everything that a run consists of."""

    def __init__(self, steps: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        schedule = dr.schedules.dynamic_rank(rank=12, inflate=0.3, deflate=0.6, to="low-rank")
        self.ranks = dr.RankScheduler(self.model, self.optimizer, schedule, total_steps=steps)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
        self.ranks.follow(self.ema)  # the only line that the average needs
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(self, x: Tensor, y: Tensor, *, overflow: bool = False) -> bool:
        """One step from several micro-batches; returns whether layers have changed form."""
        for _ in range(ACCUMULATE):
            batch = torch.randint(len(x), (32,))
            loss = F.cross_entropy(self.model(x[batch]), y[batch]) / ACCUMULATE
            self.scaler.scale(loss * float("inf") if overflow else loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)  # asked for at each step
        self.scaler.step(self.optimizer)
        self.scaler.update()
        changes = self.ranks.step()  # counts nothing if the scaler has skipped the step
        self.optimizer.zero_grad()
        if not overflow:
            self.ema.update_parameters(self.model)
        return bool(changes)

    def train(self, data: Digits, steps: int) -> None:
        """Train until the rank scheduler has counted so many steps."""
        x, y, *test = data
        skipped = self.ranks.last_step > SKIPPED
        while self.ranks.last_step < steps:
            overflow = self.ranks.last_step == SKIPPED and not skipped
            skipped |= overflow
            before = loss_of(self.ema, *test)
            if self.step(x, y, overflow=overflow):
                after, form = loss_of(self.ema, *test), type(self.model[0].form).__name__
                print(f"step {self.ranks.last_step}: {form}; average {before:.3f} -> {after:.3f}")
                assert abs(after - before) < 0.2 * before + 0.05


@torch.no_grad()
def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The loss on all of the data."""
    return F.cross_entropy(model(x), y).item()


def main(steps: int) -> None:
    """Train once without and once with an interruption, and compare the averages."""
    data, folder = digits(), Path(tempfile.mkdtemp()) / "last"
    whole = Run(steps)
    whole.train(data, steps)
    assert whole.ranks.last_step == steps == int(whole.ema.n_averaged)

    run = Run(steps)
    run.train(data, steps // 2)  # in the full-rank phase
    dr.save(folder, **vars(run))
    resumed = Run(steps, seed=1)  # as in a new process: other weights, other random states
    dr.load(folder, **vars(resumed))
    resumed.train(data, steps)

    ends = (one.ema.state_dict().values() for one in (whole, resumed))
    assert all(map(torch.equal, *ends))
    losses = [loss_of(one, *data[2:]) for one in (whole.model, whole.ema)]
    print("test loss of the model {:.3f}, of its average {:.3f}".format(*losses))
    print("the resumed average is bit by bit the same: True")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="the length of the run")
    main(parser.parse_args().steps)
