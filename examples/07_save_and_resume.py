"""A run that is interrupted in its midst and goes on bit by bit as if it had not been.

One run of dynamic rank trains to its end. Another is saved at a step in its full-rank phase, and
goes on from the folder in new objects: a plain model, a new optimizer, a new rank scheduler. Needs
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

import dynarank as dr


class Run:
    """Everything that a run consists of."""

    def __init__(self, steps: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Linear(256, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        schedule = dr.schedules.dynamic_rank(rank=0.25, inflate=0.3, deflate=0.7)
        self.ranks = dr.RankScheduler(self.model, self.optimizer, schedule, total_steps=steps)

    def train(self, x: Tensor, y: Tensor, start: int, stop: int) -> float:
        """Steps ``start`` to ``stop``, each on a random batch; returns the last loss."""
        loss = torch.zeros(())
        for _ in range(start, stop):
            batch = torch.randint(len(x), (64,))
            loss = F.cross_entropy(self.model(x[batch]), y[batch])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.step()
            self.ranks.step()
        return loss.item()


def main(steps: int) -> None:
    """Train once without and once with an interruption, and compare the weights."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    x, half = (x - x.mean()) / x.std(), steps // 2

    whole = Run(steps)
    print(f"uninterrupted: loss {whole.train(x, y, 0, steps):.4f}")

    run = Run(steps)
    run.train(x, y, 0, half)
    folder = Path(tempfile.mkdtemp()) / "last"
    dr.save(folder, **vars(run), extra={"step": half})
    print(f"saved at step {half}: {run.model[0].form}, in {len(list(folder.iterdir()))} files")

    resumed = Run(steps, seed=1)  # as in a new process: other weights, other random states
    step = dr.load(folder, **vars(resumed))["step"]
    print(f"resumed: loss {resumed.train(x, y, step, steps):.4f}")
    ends = (one.model.state_dict().values() for one in (whole, resumed))
    print("bit by bit the same weights:", all(map(torch.equal, *ends)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="the length of the run")
    main(parser.parse_args().steps)
