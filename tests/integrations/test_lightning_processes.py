"""Lightning in two processes: losses are those of one, and checkpoints go on there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_runs import ENDINGS, STEPS, batches, plain_losses, schedule
from lightning_runs import QUIET, Loader, Module, every_four, launched, trainer
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
    for step in (12, 20):
        again = processes(2)(ddp, to, str(tmp_path / "again"), str(tmp_path / f"step={step}.ckpt"))
        assert again == [one[step:] for one in both], step


class Sharded(Module):
    """Sharded by FSDP2, with one unit inside."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh: Any = self.device_mesh
        if not isinstance(self.net, torch.distributed.fsdp.FSDPModule):
            fully_shard(self.net[2], mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])


def sharded(whole: bool) -> dict[str, Any]:
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=not whole)
    return {"strategy": strategy, "devices": 2, "max_epochs": 1}


def fsdp2(to: str, whole: bool, folder: str, checkpoint: str | None = None) -> list[float]:
    with launched():
        module = Sharded(9 if checkpoint else 0)
        callback = DynamicRankCallback(schedule(to))
        run = trainer(callback, every_four(Path(folder)), **sharded(whole))
        run.fit(module, Half(), ckpt_path=checkpoint)
        dr.check(module, run.optimizers, ranks=callback.ranks)
        assert callback.ranks.last_step == STEPS
        return module.losses


def predicted(whole: bool, checkpoint: str) -> torch.Tensor:
    with launched():
        run = trainer(DynamicRankCallback(schedule()), **sharded(whole))
        found: Any = run.predict(Sharded(9), Half(), ckpt_path=checkpoint)
        return found[0]


@pytest.mark.parametrize(("to", "whole"), [("adapted", False), ("low-rank", True)])
def test_fsdp2(to: str, whole: bool, processes: Pools, tmp_path: Path) -> None:
    both = processes(2)(fsdp2, to, whole, str(tmp_path))
    losses = [(a + b) / 2 for a, b in zip(*both, strict=True)]
    model = Module()
    assert losses == pytest.approx(plain_losses(to, model=model), abs=1e-5)
    for step in (12, 20):
        path = str(tmp_path / f"step={step}.ckpt")
        again = processes(2)(fsdp2, to, whole, str(tmp_path / "again"), path)
        assert again == [one[step:] for one in both], step
    found = processes(2)(predicted, whole, str(tmp_path / f"step={STEPS}.ckpt"))
    for rank in (0, 1):
        own = model(batches(1)[0][0][rank::2])
        torch.testing.assert_close(found[rank], own.detach(), rtol=1e-3, atol=1e-4)


class Halves(Module):
    def train_dataloader(self) -> Any:
        return Half()


@pytest.mark.filterwarnings("ignore:.*`mps`|.*fork|.*num_workers|.*sync_dist")
def test_ddp_that_spawns_gives_the_trained_model_back() -> None:
    module, model = Halves(), Module()
    callback = DynamicRankCallback(schedule("low-rank"))
    trainer(callback, strategy="ddp_spawn", devices=2, max_epochs=1).fit(module)
    plain_losses("low-rank", model=model)
    assert dr.current_plan(module) == dr.current_plan(model)
    x = batches(1)[0][0]
    torch.testing.assert_close(module(x), model(x), rtol=1e-3, atol=1e-4)
