"""A loop of one's own under Lightning Fabric: its model and optimizer, saved and loaded by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_runs import (
    ENDINGS,
    POSITIONS,
    STEPS,
    adamw,
    batches,
    loss_of,
    mlp,
    plain_losses,
    schedule,
)
from lightning.fabric import Fabric
from lightning_runs import QUIET, launched
from process_pool import Pools

import dynarank as dr
from dynarank import RankScheduler

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in QUIET]


class Run:
    """The run that every host is compared with, under Fabric."""

    def __init__(
        self, to: str = "adapted", seed: int = 0, wrap: Any = None, **options: Any
    ) -> None:
        core, options = mlp(seed), {"accelerator": "cpu", "devices": 1, **options}
        self.fabric = Fabric(**options)
        self.fabric.launch()
        own = core if wrap is None else wrap(core)
        self.model, self.optimizer = self.fabric.setup(own, adamw(core))
        self.ranks = RankScheduler(self.model, self.optimizer, schedule(to), STEPS)
        assert self.ranks.model is core
        self.losses: list[float] = []

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "ranks": self.ranks}

    def train(self, until: int = STEPS, accumulate: int = 1) -> list[float]:
        rank, size = self.fabric.global_rank, self.fabric.world_size
        given = [(x[rank::size], y[rank::size]) for x, y in batches(STEPS * accumulate)]
        for number in range(self.ranks.last_step * accumulate, until * accumulate):
            last = number % accumulate == accumulate - 1
            with self.fabric.no_backward_sync(self.model, enabled=not last):
                loss = loss_of(self.model, given[number])
                self.losses.append(loss.item())
                self.fabric.backward(loss / accumulate)
            if last:
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.ranks.step()
        dr.check(self.model, self.optimizer, ranks=self.ranks)
        return self.losses


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("to", ENDINGS)
def test_losses_are_the_plain_loops(to: str, accumulate: int) -> None:
    assert Run(to).train(accumulate=accumulate) == plain_losses(to, accumulate=accumulate)


def test_bf16_runs_and_counts_each_step() -> None:
    run = Run(precision="bf16-mixed")
    run.train()
    assert run.ranks.last_step == STEPS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile
@pytest.mark.parametrize("to", ENDINGS)
def test_a_compiled_model(to: str) -> None:
    run = Run(to, wrap=lambda model: torch.compile(model, backend="eager"))
    assert run.train() == plain_losses(to)


@pytest.mark.parametrize("step", POSITIONS)
@pytest.mark.parametrize("to", ENDINGS)
def test_fabric_saves_and_loads_in_each_form(to: str, step: int, tmp_path: Path) -> None:
    first = Run(to)
    first.train(until=step)
    first.fabric.save(tmp_path / "run.ckpt", first.state)
    losses = first.train()
    other = Run(to, seed=9)
    rest = other.fabric.load(tmp_path / "run.ckpt", other.state)
    assert rest == {} and other.ranks.last_step == step
    assert other.train() == losses[step:]


def test_fabric_loads_weights_of_another_form_alone(tmp_path: Path) -> None:
    first = Run("low-rank")
    first.train()
    torch.save(first.model.state_dict(), tmp_path / "run.ckpt")
    other = Run("low-rank", seed=9)
    other.train(until=12)
    other.fabric.load_raw(tmp_path / "run.ckpt", other.model)
    x = batches(1)[0][0]
    assert torch.equal(other.model(x), first.model(x))


def ddp(to: str, path: str) -> tuple[list[float], list[float]]:
    """The losses of a run, and of one that goes on from its twelfth step."""
    with launched():
        runs = [Run(to, seed, strategy="ddp", devices=2) for seed in (0, 9)]
        runs[0].train(until=12)
        runs[0].fabric.save(path, runs[0].state)
        runs[0].train()
        runs[1].fabric.load(path, runs[1].state)
        return runs[0].losses, runs[1].train()


@pytest.mark.slow
@pytest.mark.parametrize("to", ENDINGS)
def test_two_processes(to: str, processes: Pools, tmp_path: Path) -> None:
    both = processes(2)(ddp, to, str(tmp_path / "run.ckpt"))
    losses = [(a + b) / 2 for a, b in zip(*(one for one, _ in both), strict=True)]
    assert losses == pytest.approx(plain_losses(to), abs=1e-5)
    assert [again for _, again in both] == [one[12:] for one, _ in both]
