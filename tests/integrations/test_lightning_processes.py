"""Lightning in two processes: losses are those of one, and checkpoints go on there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runs import ENDINGS, STEPS, adamw, plain_losses, schedule
from lightning_runs import QUIET, Loader, Module, every_four, trainer
from process_pool import Pools

import dynarank as dr
from dynarank.integrations.lightning import DynamicRankCallback

pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(f"ignore:{text}") for text in QUIET),
]


class Half(Loader):
    """Each process has every second row of a batch."""

    def __init__(self) -> None:
        super().__init__()
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.batches = [(x[rank::2], y[rank::2]) for x, y in self.batches]


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


def ddp(to: str, folder: str, checkpoint: str | None = None) -> list[float]:
    with launched():
        module = Module(9 if checkpoint else 0)
        callback = DynamicRankCallback(schedule(to))
        run = trainer(callback, every_four(Path(folder)), strategy="ddp", devices=2, max_epochs=1)
        run.fit(module, Half(), ckpt_path=checkpoint)
        dr.check(module, run.optimizers, ranks=callback.ranks)
        assert callback.ranks.last_step == STEPS
        return module.losses


@pytest.mark.parametrize("to", ENDINGS)
def test_ddp(to: str, processes: Pools, tmp_path: Path) -> None:
    both = processes(2)(ddp, to, str(tmp_path))
    losses = [(a + b) / 2 for a, b in zip(*both, strict=True)]
    assert losses == pytest.approx(plain_losses(to, model=Module()), abs=1e-5)
    for step in (4, 12, 20):
        again = processes(2)(ddp, to, str(tmp_path / "again"), str(tmp_path / f"step={step}.ckpt"))
        assert again == [one[step:] for one in both], step
