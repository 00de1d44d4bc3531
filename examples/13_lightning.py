"""Lightning's Trainer: one callback, and each loss is that of a plain loop, after a resume too.

A multilayer perceptron on real digits: low-rank, full-rank, adapters. Needs scikit-learn and
Lightning (``pip install 'dynarank[demo,lightning]'``).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dynarank as dr
from dynarank.integrations.lightning import DynamicRankCallback

# Lightning 2.6 uses an old name of torch's; the runs that resume save nothing more.
warnings.filterwarnings("ignore", ".*LeafSpec|.*callbacks used to create the checkpoint")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Batches:
    """Shuffled batches of digits; goes on where it was when a checkpoint was saved."""

    def __init__(self, steps: int, size: int = 64) -> None:
        digits = load_digits()
        self.x = torch.tensor(digits.data, dtype=torch.float32) / 16
        self.y = torch.tensor(digits.target)
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(len(self.y), (steps, size), generator=generator)
        self.given = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.rows[self.given :]:
            self.given += 1
            yield self.x[rows], self.y[rows]

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.given = state["given"]


class Digits(L.LightningModule):
    """Nothing in it knows of dynarank."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def plain_loop(schedule: dr.schedules.Schedule, steps: int) -> Digits:
    """What the trainer is compared with."""
    model = Digits()
    optimizer = model.configure_optimizers()
    ranks = dr.RankScheduler(model, optimizer, schedule, total_steps=steps)
    for batch in Batches(steps):
        model.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.step()
    return model


def fit(model: Digits, schedule: dr.schedules.Schedule, steps: int, **more: Path) -> None:
    """Train, print the changes, and save a checkpoint after each quarter of the run."""
    callbacks: list[L.Callback] = [DynamicRankCallback(schedule, callbacks=[told])]
    if folder := more.pop("folder", None):
        every = max(1, steps // 4)
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)
        callbacks.append(saves)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=callbacks, logger=False,
        enable_checkpointing=folder is not None, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, Batches(steps), **more)


def told(changes: list[dr.Change]) -> None:
    """Print the first of the changes."""
    one = changes[0]
    print(f"{len(changes)} layers change; {one.path}: {one.before} -> {one.after}")


def main(steps: int) -> None:
    """Compare losses: of the trainer, of a plain loop, and of a trainer that resumes."""
    schedule = dr.schedules.dynamic_rank(rank=0.25, inflate=0.37, deflate=0.8)
    plain, model, folder = plain_loop(schedule, steps), Digits(), Path(tempfile.mkdtemp())
    fit(model, schedule, steps, folder=folder)
    assert model.losses == plain.losses
    print(f"the losses of {steps} steps are the plain loop's")

    for step in range(steps // 4, steps, steps // 4):
        resumed = Digits(seed=1)
        fit(resumed, schedule, steps, ckpt_path=folder / f"step={step}.ckpt")
        assert resumed.losses == plain.losses[step:]
        print(f"resumed after step {step}: the same losses")

    loaded, data = Digits.load_from_checkpoint(folder / f"step={steps}.ckpt"), Batches(1)
    assert torch.equal(loaded(data.x), model(data.x))
    share = (loaded(data.x).argmax(1) == data.y).float().mean()
    print(f"loaded without a trainer: {loaded.net[2].form}, {share:.1%} of the digits are right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="the length of the run")
    main(parser.parse_args().steps)
