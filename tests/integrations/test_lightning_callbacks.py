"""Beside Lightning's other callbacks and tuners; and what is refused before any step."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runs import (
    INFLATE,
    STEPS,
    adamw,
    batches,
    loss_of,
    plain_losses,
    ranks_of,
    schedule,
)
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.tuner import Tuner
from lightning_runs import QUIET, Loader, Module, every_four, fit, trainer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dynarank as dr
from dynarank import FullRank, LowRank
from dynarank.integrations import lightning as integration
from dynarank.integrations.lightning import DynamicRankCallback

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in QUIET]


class Tunable(Module):
    """With an attribute for each tuner."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.lr, self.batch_size = 1e-2, 8

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
        data = torch.utils.data.TensorDataset(x, y)
        return torch.utils.data.DataLoader(data, batch_size=self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:.*tensor to a scalar|.*log_interval|Batch size|.*`fit_loop`")
@pytest.mark.parametrize("tuner", ["lr callback", "size callback", "lr", "size"])
def test_a_tuner_before_the_run_leaves_no_trace(
    tuner: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    callback, module, more = DynamicRankCallback(schedule()), Tunable(), []
    if tuner == "lr callback":
        more = [LearningRateFinder(num_training_steps=12, update_attr=False)]
    elif tuner == "size callback":
        more = [BatchSizeFinder(steps_per_trial=2, init_val=8, max_trials=1)]
    run = trainer(callback, *more, max_epochs=1)
    if tuner == "lr":
        Tuner(run).lr_find(module, num_training=12, update_attr=False)
    elif tuner == "size":
        Tuner(run).scale_batch_size(module, steps_per_trial=2, init_val=8, max_trials=1)
    module.batch_size = 8
    run.fit(module)
    assert more or len(module.losses) > STEPS  # the tuner has trained
    assert module.losses[-STEPS:] == plain_losses(model=Module())
    assert callback.ranks.last_step == STEPS


def test_early_stopping_and_the_monitor_of_rates(tmp_path: Path) -> None:
    class Stops(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("worse", float(self.trainer.current_epoch), batch_size=1)
            return super().training_step(batch, batch_idx)

    from lightning.pytorch.loggers import CSVLogger

    module, callback = Stops(), DynamicRankCallback(schedule())
    stop = EarlyStopping("worse", patience=1, check_on_train_epoch_end=True)
    more = {"limit_train_batches": 6, "max_epochs": 4, "logger": CSVLogger(tmp_path)}
    trainer(callback, stop, LearningRateMonitor(), **more, log_every_n_steps=3).fit(
        module, Loader()
    )
    assert callback.ranks.last_step == 12 and callback.ranks.total_steps == STEPS
    assert module.losses[:6] == plain_losses(model=Module())[:6]


def test_the_sanity_check_sees_the_first_form() -> None:
    class Looks(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append((self.global_step, type(dr.current_plan(self)["net.0"])))

    seen: list[Any] = []
    loader: Any = torch.utils.data.DataLoader(batches(1), batch_size=None)
    more: dict[str, Any] = {"num_sanity_val_steps": 1, "val_check_interval": INFLATE}
    run = trainer(DynamicRankCallback(schedule()), max_epochs=1, **more)
    run.fit(Looks(), Loader(), loader)
    assert seen[:2] == [(0, LowRank), (INFLATE, FullRank)]


# --- fit again


def test_fit_is_called_again_with_the_same_trainer(monkeypatch: Any) -> None:
    module, callback = Module(), DynamicRankCallback(schedule(), total_steps=STEPS)
    run = trainer(callback, max_epochs=1, limit_train_batches=12)
    run.fit(module, Loader(12))
    closed, before = list[int](), id(callback.ranks)
    monkeypatch.setattr(dr.RankScheduler, "close", lambda ranks: closed.append(id(ranks)))
    run.fit_loop.max_epochs = 2
    run.fit(module, Loader(12))
    ranks = callback.ranks
    assert (ranks.last_step, ranks.total_steps) == (STEPS, STEPS)
    assert closed == [before]
    again = Module()
    other = DynamicRankCallback(schedule())
    trainer(other, max_epochs=1).fit(again, Loader())
    assert dr.current_plan(again) == dr.current_plan(module)


def test_a_checkpoint_of_another_form_is_tested_before_fit_is_called_again(tmp_path: Path) -> None:
    module, callback = Module(), DynamicRankCallback(schedule(), total_steps=STEPS)
    run = trainer(callback, every_four(tmp_path), max_epochs=1)
    run.fit(module, Loader(10))
    run.test(module, Loader(1), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    run.callbacks.pop()  # type: ignore[attr-defined]
    run.fit_loop.max_epochs = 2
    run.fit(module, Loader(2))
    assert callback.ranks.last_step == 12
    assert dr.current_plan(module)["net.0"] == FullRank()


def test_another_length_when_fit_is_called_again_is_refused() -> None:
    module, callback = Module(), DynamicRankCallback(schedule())
    run = trainer(callback, max_epochs=1)
    run.fit(module, Loader())
    run.fit_loop.max_epochs = 2
    with pytest.raises(ValueError, match=r"has 24 steps, this trainer's has 48.*total_steps=24"):
        run.fit(module, Loader())
    assert len(module.losses) == STEPS


def test_a_new_trainer_begins_a_new_run() -> None:
    module, callback = Module(), DynamicRankCallback(schedule())
    for _ in range(2):
        trainer(callback, max_epochs=1).fit(module, Loader())
        assert callback.ranks.last_step == STEPS


def test_another_module_in_the_middle_of_a_run_is_refused() -> None:
    callback = DynamicRankCallback(schedule())
    run = trainer(callback, max_epochs=1)
    run.fit(Module(), Loader())
    run.fit_loop.max_epochs, module = 2, Module(9)
    with pytest.raises(ValueError, match=r"after 24 steps.*made without it.*new Trainer"):
        run.fit(module, Loader())
    assert not module.losses and type(module.net[0]) is torch.nn.Linear


def test_a_checkpoint_without_a_position_is_refused(tmp_path: Path) -> None:
    plain = Module()
    trainer(every_four(tmp_path), max_epochs=1).fit(plain, Loader())
    module = Module(9)
    with pytest.raises(ValueError, match=r"after 12 steps.*no state of it.*load_from_checkpoint"):
        fit(module, checkpoint=tmp_path / "step=12.ckpt")
    assert not module.losses and type(module.net[0]) is torch.nn.Linear
    run = trainer(DynamicRankCallback(schedule()))
    run.validate(module, Loader(1), ckpt_path=tmp_path / "step=12.ckpt", verbose=False)


# --- refused


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_with_flat_parameters_are_refused(kind: type) -> None:
    class Stand:
        strategy, max_epochs = object.__new__(kind), 1

    module, run = Module(), Stand()
    with pytest.raises(ValueError, match=rf"strategy is {kind.__name__}.*flat buffers.*use .*ddp"):
        DynamicRankCallback(schedule()).setup(run, module, "fit")  # type: ignore[arg-type]
    assert not module._load_state_dict_pre_hooks


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_two_versions_are_refused_by_name(version: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=rf"lightning {version} .*install another version"):
        integration._host()


def test_without_lightning_the_error_names_the_extra(monkeypatch: Any) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"needs `lightning`.*pip install.*\[lightning\]"):
        integration._host()


def test_the_older_package_serves_where_it_is_the_only_one(monkeypatch: Any) -> None:
    def only(name: str) -> str:
        if name != "pytorch-lightning":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.6.6"

    stand: Any = type(sys)("pytorch_lightning")
    monkeypatch.setattr(importlib.metadata, "version", only)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", stand)
    assert integration._host() is stand


def test_no_rank_scheduler_before_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"trainer\.fit makes it"):
        _ = DynamicRankCallback(schedule()).ranks


def test_a_run_without_an_optimizer_is_refused() -> None:
    class Without(Module):
        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(ValueError, match="no optimizer"), pytest.warns(UserWarning):
        fit(Without())


class Unfreezing(BaseFinetuning):
    """Trains the first layer from the second epoch on, in a group of its own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class Backbone(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("first", [True, False])
def test_a_backbone_is_unfrozen_in_a_run_that_goes_on(first: bool, tmp_path: Path) -> None:
    def run(module: Module, *callbacks: Any, checkpoint: Path | None = None) -> None:
        own = [DynamicRankCallback(schedule(), layers=["net.0", "net.2"]), Unfreezing()]
        own = own if first else own[::-1]
        one = trainer(*own, *callbacks, max_epochs=2)
        one.fit(module, Loader(12), ckpt_path=checkpoint)  # type: ignore[arg-type]
        assert [len(group["params"]) for group in one.optimizers[0].param_groups] == [5, 3]

    module = Backbone()
    run(module, every_four(tmp_path))
    again = Backbone(9)
    run(again, checkpoint=tmp_path / "step=8.ckpt")  # the names in the group have just changed
    assert again.losses == module.losses[8:]


# --- averages


class Validated(Module):
    """Says what it is validated as."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.outputs: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.outputs.append(self(batch[0]).detach())


def plain_average(to: str, module: Module) -> list[torch.Tensor]:
    """The outputs of an EMA in a plain loop after every six steps, of its own and at the end."""
    optimizer = adamw(module)
    ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    ranks = ranks_of(module, optimizer, to)
    ranks.follow(ema)
    found: list[torch.Tensor] = []
    for number, batch in enumerate(batches()):
        loss_of(module, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.step()
        ema.update_parameters(module)
        if number % 6 == 5:
            found.append(ema(batches(1)[0][0]).detach())
    return found


@pytest.mark.parametrize(("to", "first"), [("low-rank", True), ("adapted", False)])
def test_lightnings_ema_follows(to: str, first: bool, tmp_path: Path) -> None:
    module, callback = Validated(), DynamicRankCallback(schedule(to))
    ema = EMAWeightAveraging(decay=0.5, update_starting_at_step=0)
    loader: Any = torch.utils.data.DataLoader(batches(1), batch_size=None)
    more = {"max_epochs": 1, "val_check_interval": 6, "num_sanity_val_steps": 0}
    own = [callback, ema] if first else [ema, callback]
    trainer(*own, every_four(tmp_path), **more).fit(module, Loader(), loader)
    if first:
        for own_output, plain in zip(module.outputs, plain_average(to, Module()), strict=True):
            torch.testing.assert_close(own_output, plain)
    for step in (12, 20):
        again, ema = Validated(9), EMAWeightAveraging(decay=0.5, update_starting_at_step=0)
        callback = DynamicRankCallback(schedule(to))
        own = [callback, ema] if first else [ema, callback]
        path = tmp_path / f"step={step}.ckpt"
        trainer(*own, **more).fit(again, Loader(), loader, ckpt_path=path)
        assert again.losses == module.losses[step:], step
        assert torch.equal(again.outputs[-1], module.outputs[-1]), step


def test_lightnings_swa_follows(tmp_path: Path) -> None:
    module, callback = Module(), DynamicRankCallback(schedule("low-rank"))
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=2)
    more: dict[str, Any] = {"max_epochs": 4, "limit_train_batches": 6}
    run = trainer(swa, callback, every_four(tmp_path), **more)
    run.fit(module, Loader())
    assert callback.ranks.last_step == callback.ranks.total_steps == STEPS
    assert dr.current_plan(module) == dr.current_plan(swa._average_model)
    inside: Any = swa._average_model
    x = batches(1)[0][0]
    assert torch.equal(module(x), inside(x))  # the average has been copied to the module


class Normed(Module):
    """SWA adds an epoch in which BatchNorm is estimated, and no step is made."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, torch.nn.BatchNorm1d(32))


@pytest.mark.parametrize("first", [True, False])
def test_the_epoch_that_swa_adds_is_none_of_the_schedules(first: bool) -> None:
    callback = DynamicRankCallback(schedule())
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=2)
    own = [callback, swa] if first else [swa, callback]
    trainer(*own, max_epochs=4, limit_train_batches=6).fit(Normed(), Loader())
    assert callback.ranks.last_step == callback.ranks.total_steps == STEPS
