"""The run that every host is compared with, under Lightning's trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from host_runs import STEPS, Batch, adamw, batches, loss_of, mlp, schedule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD, Optimizer

from dynarank.integrations.lightning import DynamicRankCallback

# Lightning's own warnings of tiny runs, and of torch's newer names.
QUIET = (
    ".*does not have many workers",
    ".*LeafSpec.*is deprecated",
    ".*callbacks used to create the checkpoint need to be provided",
    ".*no `val_dataloader`",
)
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Module(L.LightningModule):
    """The network of the runs; keeps the loss of each batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = mlp(seed)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).float()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = loss_of(self, batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = loss_of(self, batch)
        self.log("validation", loss, batch_size=len(batch[0]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test", loss_of(self, batch), batch_size=len(batch[0]))

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return adamw(self.net)


def two_optimizers(net: Any) -> list[Optimizer]:
    """Of the first layer, and of the others."""
    rest = [*net[2].parameters(), *net[4].parameters()]
    first = torch.optim.AdamW(net[0].parameters(), lr=1e-2)
    return [first, SGD(rest, lr=1e-2, momentum=0.9)]


class Manual(Module):
    """Two optimizers in manual optimization, which step together or by turns."""

    by_turns = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return two_optimizers(self.net)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        both: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        for one in both:
            one.zero_grad()
        self.manual_backward(loss)
        for one in [both[batch_idx % 2]] if self.by_turns else both:
            one.step()


class Loader:
    """Goes on where it was when a checkpoint was saved."""

    def __init__(self, count: int = STEPS) -> None:
        self.batches, self.given = batches(count), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.given % len(self), len(self)):
            self.given = number + 1
            yield self.batches[number]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def trainer(*callbacks: Any, **more: Any) -> L.Trainer:
    """A quiet one on the CPU."""
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keeps = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    options |= {"accelerator": "cpu", "devices": 1, "enable_checkpointing": keeps}
    return L.Trainer(callbacks=list(callbacks), **{**options, **more})


def every_four(folder: Path) -> ModelCheckpoint:
    """All checkpoints after 4, 8, ... steps, in ``step=4.ckpt``, ..."""
    return ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")


def fit(
    module: Module,
    to: str = "adapted",
    *callbacks: Any,
    accumulate: int = 1,
    checkpoint: Path | None = None,
    **more: Any,
) -> DynamicRankCallback:
    """A run of one epoch; the losses are in the module."""
    callback = DynamicRankCallback(schedule(to))
    more = {"max_epochs": 1, "accumulate_grad_batches": accumulate, **more}
    loader: Any = Loader(STEPS * accumulate)
    trainer(callback, *callbacks, **more).fit(module, loader, ckpt_path=checkpoint)
    return callback


@contextmanager
def launched() -> Iterator[None]:
    """The variables of torchrun: Lightning takes the processes that are there."""
    rank = str(torch.distributed.get_rank())
    given = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "run"}
    given |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    given |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]
