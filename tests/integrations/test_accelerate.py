"""Accelerate's save_state and load_state keep the rank scheduler, in every form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from host_runs import (
    ENDINGS,
    POSITIONS,
    STEPS,
    adamw,
    batches,
    forms_at,
    loss_of,
    mlp,
    ranks_of,
)
from torch import nn
from torch.optim.lr_scheduler import LinearLR

import dynarank as dr
from dynarank.integrations.accelerate import attach

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Run:
    """A loop as Accelerate's users write it."""

    def __init__(
        self,
        to: str = "adapted",
        *,
        accumulate: int = 1,
        precision: str = "no",
        seed: int = 0,
        start: Callable[[nn.Module], object] = lambda model: None,
        optimizer: Callable[[nn.Module], Any] = adamw,
        config: Any = None,
        rates: bool = False,
        attached: bool = True,
        **more: Any,
    ) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=accumulate,
            mixed_precision=precision,
            project_config=config,
        )
        self.accumulate = accumulate
        model = mlp(seed)
        start(model)
        own = optimizer(model)
        given = self.accelerator.prepare(model, own, LinearLR(own, 1.0, 0.1, STEPS))
        self.model, self.optimizer, self.rates = given
        if rates:
            more["lr_scheduler"] = self.rates
        self.ranks = ranks_of(self.model, self.optimizer, to, **more)
        self.attached = attach(self.accelerator, self.ranks) if attached else None
        self.losses: list[float] = []

    def forms(self) -> set[type]:
        plan = dr.current_plan(self.model)
        return {type(plan[path]) for path in self.ranks.layers}

    def to(self, end: int = STEPS, save: Path | None = None) -> list[float]:
        """Train up to a step, saving at the positions; the losses of these steps."""
        own, given = self.accelerator, batches(STEPS * self.accumulate)
        losses: list[float] = []
        for batch in given[self.ranks.last_step * self.accumulate : end * self.accumulate]:
            with own.accumulate(self.model):
                with own.autocast():
                    loss = loss_of(self.model, batch)
                losses.append(loss.item())
                own.backward(loss)
                if own.sync_gradients:
                    own.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.rates.step()
                self.optimizer.zero_grad()
                self.ranks.step()
            if save and own.sync_gradients and self.ranks.last_step in POSITIONS:
                own.save_state(f"{save}/{self.ranks.last_step}")
        return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[float], Path]]:
    """The losses of a run, and the folders that it saved, by its arguments."""
    made: dict[str, tuple[list[float], Path]] = {}

    def of(*args: Any, **more: Any) -> tuple[list[float], Path]:
        key = f"{args} {more}"
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            made[key] = Run(*args, **more).to(save=folder), folder
        return made[key]

    return of


STARTS = {
    "plain": lambda model: None,
    "low-rank": lambda model: dr.factorize(model, 2),
    "adapted": lambda model: dr.deflate(dr.factorize(model, 6), to="adapted"),
}


@pytest.mark.parametrize("at", POSITIONS)
@pytest.mark.parametrize("to", ENDINGS)
@pytest.mark.parametrize(("accumulate", "precision"), [(1, "no"), (2, "no"), (1, "bf16")])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    saved: Any, accumulate: int, precision: str, to: str, at: int
) -> None:
    losses, folder = saved(to, accumulate=accumulate, precision=precision)
    run = Run(to, accumulate=accumulate, precision=precision, seed=9)
    run.accelerator.load_state(f"{folder}/{at}")
    assert run.ranks.last_step == at
    assert run.forms() == {forms_at(at, to)}
    assert run.to() == losses[at * accumulate :]


@pytest.mark.parametrize("start", ["low-rank", "adapted"])
@pytest.mark.parametrize("at", (4, 12, 20))
def test_the_model_may_have_any_form_before(saved: Any, start: str, at: int) -> None:
    losses, folder = saved("adapted")
    run = Run(seed=9, start=STARTS[start], layers=["0", "2"])
    run.accelerator.load_state(f"{folder}/{at}")
    assert run.to() == losses[at:]
