"""Hugging Face Accelerate: one line more, ``attach``, and ``save_state`` keeps the forms.

A loop as Accelerate's documentation shows it, with accumulated gradients, is compared with a plain
one, step by step, through both changes of form. Then new objects resume it in the middle of an
epoch. Needs Accelerate and scikit-learn (``pip install 'dynarank[accelerate,demo]'``).

    python examples/14_accelerate.py
    accelerate launch --multi_gpu --num_processes 2 examples/14_accelerate.py  # on CPUs too
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import dynarank as dr
from dynarank.integrations.accelerate import attach

ACCUMULATE = 2


def loader() -> DataLoader:
    """Return the batches of an epoch, always in one order."""
    digits = load_digits()
    order = torch.randperm(1408, generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    return DataLoader(TensorDataset(x, torch.tensor(digits.target)[order]), 64)  # 22 of them


def parts(seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, CosineAnnealingLR]:
    """Return a new model, its optimizer and its LR scheduler."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return model, optimizer, CosineAnnealingLR(optimizer, steps)


def plain(epochs: int, schedule: dr.schedules.Schedule) -> list[float]:
    """Train without Accelerate; return the loss of every batch."""
    train, losses = loader(), list[float]()
    steps = epochs * len(train) // ACCUMULATE
    model, optimizer, lr_scheduler = parts(0, steps)
    ranks = dr.RankScheduler(model, optimizer, schedule, steps, lr_scheduler=lr_scheduler)
    for _ in range(epochs):
        for number, (x, y) in enumerate(train):
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.item())
            (loss / ACCUMULATE).backward()
            if (number + 1) % ACCUMULATE == 0:
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                ranks.step()
    return losses


class Accelerated:
    """The same run with Accelerate."""

    def __init__(self, epochs: int, schedule: dr.schedules.Schedule, seed: int = 0) -> None:
        split = DataLoaderConfiguration(split_batches=True)
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=ACCUMULATE, dataloader_config=split
        )
        given, self.epochs = loader(), epochs
        steps = epochs * len(given) // ACCUMULATE
        prepared = self.accelerator.prepare(*parts(seed, steps), given)
        self.model, self.optimizer, self.lr_scheduler, self.loader = prepared
        self.ranks = dr.RankScheduler(
            self.model, self.optimizer, schedule, steps, lr_scheduler=self.lr_scheduler
        )
        attach(self.accelerator, self.ranks)

    def train(self, save_at: int = 0, folder: Path | None = None) -> list[float]:
        """Train from where the run is; return the loss of every batch."""
        epoch, batch = divmod(self.ranks.last_step * ACCUMULATE, len(self.loader))
        rest, losses = self.accelerator.skip_first_batches(self.loader, batch), list[float]()
        for number in range(epoch, self.epochs):
            for x, y in rest if number == epoch else self.loader:
                losses.append(self._batch(x, y))
                if self.accelerator.sync_gradients and self.ranks.last_step == save_at:
                    self.accelerator.save_state(str(folder))
        return losses

    def _batch(self, x: torch.Tensor, y: torch.Tensor) -> float:
        with self.accelerator.accumulate(self.model):
            loss = F.cross_entropy(self.model(x), y)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
            for change in self.ranks.step():  # counts the steps that the optimizer took
                self.accelerator.print(
                    f"step {self.ranks.last_step}: layer {change.path} is {change.after}"
                )
        return self.accelerator.gather(loss.detach()[None]).mean().item()


def main(epochs: int) -> None:
    """Compare the loop with a plain one, and a resumed one with both."""
    schedule = dr.schedules.dynamic_rank(16, inflate=0.35, deflate=0.75)
    expected = plain(epochs, schedule)
    run = Accelerated(epochs, schedule)
    folder = Path(broadcast_object_list([tempfile.mkdtemp()])[0]) / "state"
    save_at = int(0.8 * len(expected)) // ACCUMULATE
    losses = run.train(save_at, folder)
    alone = run.accelerator.num_processes == 1
    tolerance = 0.0 if alone else 1e-4  # several processes add up in another order
    assert len(losses) == len(expected)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= tolerance
    run.accelerator.print(f"{len(losses)} losses equal those of the plain loop")

    resumed = Accelerated(epochs, schedule, seed=1)  # other weights, none of them adapted
    resumed.accelerator.load_state(str(folder))
    rest = resumed.train()
    assert rest == losses[save_at * ACCUMULATE :]
    run.accelerator.print(f"resumed at step {save_at}: the other {len(rest)} are the same")
    run.accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6, help="the length of the run")
    main(parser.parse_args().epochs)
