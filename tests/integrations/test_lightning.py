"""The callback in Lightning's trainer: each run is the plain loop's, loss by loss."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from covering import over
from host_runs import (
    ENDINGS,
    POSITIONS,
    STEPS,
    adamw,
    batches,
    loss_of,
    plain_losses,
    ranks_of,
    schedule,
)
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning_runs import QUIET, Loader, Manual, Module, every_four, fit, trainer, two_optimizers
from torch import Tensor

import dynarank as dr
from dynarank.integrations.lightning import DynamicRankCallback

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in QUIET]


@cache
def plain(to: str, accumulate: int = 1) -> list[float]:
    return plain_losses(to, accumulate=accumulate, model=Module())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, Any]]:
    """The checkpoints and the losses of runs, by ending and accumulation."""
    found: dict[tuple[str, int], tuple[Path, Any]] = {}
    for to in ENDINGS:
        for accumulate in (1, 2):
            folder, module = tmp_path_factory.mktemp("run"), Module()
            fit(module, to, every_four(folder), accumulate=accumulate)
            found[to, accumulate] = folder, module.losses
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("to", ENDINGS)
def test_losses_are_the_plain_loops(runs: Any, to: str, accumulate: int) -> None:
    _, losses = runs[to, accumulate]
    assert losses == plain(to, accumulate)


@over({"to": ENDINGS, "accumulate": [1, 2], "step": POSITIONS})
def test_a_run_goes_on_bit_by_bit(runs: Any, to: str, accumulate: int, step: int) -> None:
    folder, losses = runs[to, accumulate]
    module, path = Module(seed=9), folder / f"step={step}.ckpt"
    callback = fit(module, to, accumulate=accumulate, checkpoint=path)
    assert module.losses == losses[step * accumulate :]
    assert callback.ranks.last_step == STEPS


# --- steps


def clipped(model: Any) -> Any:
    def clip(optimizer: Any, *_: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(held, 0.1)

    optimizer = adamw(model)
    optimizer.register_step_pre_hook(clip)
    return [optimizer]


class InBf16(Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch.compile
@pytest.mark.parametrize(
    ("how", "to"),
    [(how, "low-rank") for how in ("clipped", "bf16", "compiled", "max_steps")]
    + [("manual", to) for to in ENDINGS],
)
def test_whatever_the_trainer_does_losses_are_the_plain_loops(how: str, to: str) -> None:
    module, options = Module(), dict[str, Any]()
    given: Any = module
    if how == "clipped":
        options = {"gradient_clip_val": 0.1}
        expected = plain_losses(to, model=Module(), optimizers=clipped)
    elif how == "bf16":
        options = {"precision": "bf16-mixed"}
        expected = plain_losses(to, model=InBf16())
    elif how == "manual":
        module = given = Manual()
        options = {"max_epochs": -1, "max_steps": 2 * STEPS}  # it counts those of both
        both = lambda model: two_optimizers(model.net)  # noqa: E731
        expected = plain_losses(to, model=Module(), optimizers=both)
    else:
        expected = plain(to)
        options = {"max_epochs": -1, "max_steps": STEPS} if how == "max_steps" else {}
        given = torch.compile(module, backend="eager") if how == "compiled" else module
    callback = fit(given, to, **options)
    assert callback.ranks.total_steps == STEPS
    assert module.losses == expected


class InEpochs(Module):
    """An LR scheduler of epochs, or of steps."""

    interval, frequency = "epoch", 1

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self.net)
        decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], 0.1)
        return [optimizer], [
            {"scheduler": decay, "interval": self.interval, "frequency": self.frequency}
        ]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2}, 2 * STEPS),
        ({"max_epochs": 3, "max_steps": 9}, 9),
        ({"max_epochs": 3, "limit_train_batches": 5}, 15),
        ({"max_epochs": 3, "limit_train_batches": 5, "accumulate_grad_batches": 2}, 9),
        ({"fast_dev_run": 2}, 2),
    ],
    ids=str,
)
def test_the_length_of_the_run(options: Any, steps: int) -> None:
    module, callback = Module(), DynamicRankCallback(schedule())
    trainer(callback, **options).fit(module, Loader())
    assert (callback.ranks.total_steps, callback.ranks.last_step) == (steps, steps)


def test_accumulation_that_changes_with_the_epochs() -> None:
    module, callback = Module(), DynamicRankCallback(schedule())
    by_epoch = GradientAccumulationScheduler({0: 2, 1: 4})
    trainer(callback, by_epoch, max_epochs=2, limit_train_batches=10).fit(module, Loader())
    assert (callback.ranks.total_steps, callback.ranks.last_step) == (5 + 3, 5 + 3)


class WithoutEnd:
    def __iter__(self) -> Any:
        yield from batches(4)


@pytest.mark.filterwarnings("ignore:.*`max_epochs` was not set|Your `IterableDataset`")
@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_epochs": 3}], ids=str)
def test_a_run_without_an_end_is_refused_unless_its_length_is_given(options: Any) -> None:
    given = {"loader": Loader() if options["max_epochs"] == -1 else WithoutEnd()}
    module, before = Module(), Module()
    with pytest.raises(ValueError, match=r"length of the run is unknown.*total_steps="):
        trainer(DynamicRankCallback(schedule()), **options).fit(module, given["loader"])
    assert module.losses == [] and dr.current_plan(module) == dr.current_plan(before)
    callback = DynamicRankCallback(schedule(), total_steps=STEPS)
    trainer(callback, EndAfter(3), **options).fit(module, given["loader"])
    assert (callback.ranks.total_steps, callback.ranks.last_step) == (STEPS, 3)


class EndAfter(L.Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.fit_loop.total_batch_idx + 1 >= self.batches


@pytest.mark.parametrize(
    ("interval", "frequency", "accumulate", "every"),
    [("epoch", 1, 1, 24), ("epoch", 2, 2, 24), ("step", 1, 1, 1), ("step", 3, 2, 3)],
)
def test_the_forecast_is_of_lightnings_lr_scheduler(
    interval: str, frequency: int, accumulate: int, every: int
) -> None:
    module, callback = InEpochs(), DynamicRankCallback(schedule())
    module.interval, module.frequency = interval, frequency
    run = trainer(callback, max_epochs=6, accumulate_grad_batches=accumulate)
    run.fit(module, Loader())
    forecast = callback.ranks.forecast
    assert forecast.every == every
    assert forecast.source is run.lr_scheduler_configs[0].scheduler
    rates, total = forecast.rates, callback.ranks.total_steps
    at = 2 * every / total * (len(rates) - 1)
    assert (rates[int(at) - 5], rates[int(at) + 5]) == pytest.approx((1e-2, 1e-3))


def test_the_users_rates_and_other_options_come_first() -> None:
    module = InEpochs()
    callback = DynamicRankCallback(
        schedule(), layers=["net.2"], lr_scheduler=[0.5, 0.25], moments="reset", total_steps=30
    )
    trainer(callback, max_epochs=1).fit(module, Loader())
    ranks = callback.ranks
    assert (ranks.layers, ranks.moments, ranks.total_steps) == (("net.2",), "reset", 30)
    assert ranks.forecast.rates == (0.5, 0.25)


OPTIONS = {
    "rewarm": lambda: {
        "callbacks": [dr.LRRewarmup(3)],
        "batches": lambda: [x for x, _ in batches(2)],
    },
    "calibrated": lambda: {"moments": "calibrated"},  # by gradients that Lightning's closure makes
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_rank_scheduler_do_what_they_do_in_a_plain_loop(
    name: str, tmp_path: Path
) -> None:
    model, losses = Module(), list[float]()
    optimizer = adamw(model)
    ranks = ranks_of(model, optimizer, "low-rank", **OPTIONS[name]())
    for batch in batches():
        loss = loss_of(model, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()

    def again() -> DynamicRankCallback:
        return DynamicRankCallback(schedule("low-rank"), **OPTIONS[name]())

    module, resumed = Module(), Module(9)
    trainer(again(), every_four(tmp_path), max_epochs=1).fit(module, Loader())
    assert module.losses == losses
    trainer(again(), max_epochs=1).fit(resumed, Loader(), ckpt_path=tmp_path / "step=12.ckpt")
    assert resumed.losses == losses[12:]


# --- manual optimization


def by_turns(to: str) -> list[float]:
    """The losses of a plain loop in which two optimizers step by turns."""
    model, losses = Module(), list[float]()
    both = two_optimizers(model.net)
    ranks = ranks_of(model, both, to)
    for number, batch in enumerate(batches()):
        loss = loss_of(model, batch)
        losses.append(loss.item())
        for one in both:
            one.zero_grad()
        loss.backward()
        both[number % 2].step()
        ranks.step()
    return losses


@pytest.mark.parametrize("to", ENDINGS)
def test_two_optimizers_by_turns(to: str) -> None:
    module = Manual()
    module.by_turns = True
    callback = fit(module, to)
    assert callback.ranks.total_steps == STEPS
    assert module.losses == by_turns(to)


def test_a_length_that_manual_optimization_does_not_keep_is_refused_in_the_first_batch() -> None:
    module = Manual()
    module.by_turns = True
    with pytest.raises(ValueError, match=r"took 1 optimizer steps.*of all 2.*total_steps="):
        fit(module, max_epochs=-1, max_steps=STEPS)
    assert len(module.losses) == 1
    module = Manual()
    module.by_turns = True
    callback = DynamicRankCallback(schedule(), total_steps=STEPS)
    trainer(callback, max_epochs=-1, max_steps=STEPS).fit(module, Loader())
    assert callback.ranks.last_step == STEPS and module.losses == by_turns("adapted")


class Accumulating(Manual):
    """One optimizer, which steps in every second batch."""

    def configure_optimizers(self) -> Any:
        return adamw(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(Module.training_step(self, batch, batch_idx) / 2)
        if batch_idx % 2:
            one: Any = self.optimizers()
            one.step()
            one.zero_grad()


def test_manual_accumulation_counts_optimizer_steps() -> None:
    module = Accumulating()
    callback = DynamicRankCallback(schedule())
    trainer(callback, max_epochs=-1, max_steps=STEPS).fit(module, Loader(2 * STEPS))
    assert callback.ranks.last_step == STEPS
    assert module.losses == plain("adapted", 2)
    with pytest.raises(ValueError, match=r"took 0 optimizer steps in a batch.*total_steps="):
        trainer(DynamicRankCallback(schedule()), max_epochs=1).fit(Accumulating(), Loader(48))
