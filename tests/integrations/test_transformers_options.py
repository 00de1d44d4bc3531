"""What else the Trainer does: accumulation, precisions, best model, second run, optimizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from host_runs import INFLATE, batches, forms_at, mlp, schedule
from pretrained_models import bert, gpt2, vit
from torch import nn
from trainer_runs import fit, losses, plain_losses, rows, trainer
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import dynarank as dr
from dynarank.integrations.transformers import DynamicRankCallback
from dynarank.layers import RankedLayer

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}

EVALUATED: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "trainer_eval_dataset": rows(bert(), 8),
}


def cross_entropy(outputs: Any, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels)


def form_of(model: Any) -> type:
    return type(model.bert.encoder.layer[0].attention.self.query.form)


def near(losses: list[float]) -> Any:
    return pytest.approx(losses, abs=1e-5)


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return plain_losses(bert())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    fit(bert(), folder, **SAVED)
    return folder


def test_steps_are_counted_not_batches(tmp_path: Path) -> None:
    data = rows(gpt2(), 24 * 4 * 2)
    found = fit(gpt2(), tmp_path, data=data, gradient_accumulation_steps=2)
    assert found == near(plain_losses(gpt2(), accumulate=2))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow
        ),
        {"activation_checkpointing": True},
        {"optim": "adamw_torch_fused"},
        {"max_steps": -1, "num_train_epochs": 1},
    ],
    ids=lambda how: next(iter(how)),
)
def test_options_change_no_loss(how: dict[str, Any], plain: list[float], tmp_path: Path) -> None:
    torch.compiler.reset()
    assert fit(bert(), tmp_path, **how) == near(plain)


@pytest.mark.parametrize(
    "how",
    [
        {"bf16": True},
        {"neftune_noise_alpha": 1.0, "label_smoothing_factor": 0.1},
        {"optim": "rmsprop", "lr_scheduler_type": "cosine", "warmup_steps": 4},
        {"optim": "adagrad", "restore_callback_states_from_checkpoint": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATED},
        {
            "num_train_epochs": 2,
            "max_steps": -1,
            "data": rows(bert(), 48),
            "trainer_compute_loss_func": cross_entropy,
        },
    ],
    ids=lambda how: next(iter(how)) + str(next(iter(how.values())))[:10],
)  # fmt: skip
def test_any_run_resumes(how: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(bert(), tmp_path, **SAVED, **how)
    assert fit(bert(5), tmp_path / "again", resume=f"{tmp_path}/checkpoint-12", **how) == whole


class Net(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = mlp(seed)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        y = self.net(x)
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


@pytest.mark.parametrize("step", [12, 20])
def test_any_module_resumes(step: int, tmp_path: Path) -> None:
    pairs = [pair for batch in batches(24, 4) for pair in zip(*batch, strict=True)]
    data = [{"x": x, "labels": int(y)} for x, y in pairs]
    whole = fit(Net(), tmp_path, data=data, **SAVED)
    again = tmp_path / "again"
    assert fit(Net(5), again, data=data, resume=f"{tmp_path}/checkpoint-{step}") == whole


def test_a_model_that_is_saved_under_other_names_resumes(tmp_path: Path) -> None:
    pixels = torch.randn(24 * 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    data = [{"pixel_values": one, "labels": i % 4} for i, one in enumerate(pixels)]
    whole = fit(vit(), tmp_path, data=data, **SAVED)
    resume = f"{tmp_path}/checkpoint-12"  # all full-rank: transformers would tell in its log only
    assert fit(vit(5), tmp_path / "again", data=data, resume=resume) == whole


class SavesEarly(TrainerCallback):
    """Saves when a step has ended, before the rank scheduler counts it."""

    made: Trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == INFLATE:
            self.made._save_checkpoint(given["model"], None)


def test_another_callback_may_save_before_the_change_of_its_step(tmp_path: Path) -> None:
    made, callback = trainer(bert(), tmp_path)
    made.remove_callback(callback)
    made.add_callback(SavesEarly)
    made.add_callback(callback)
    early = next(one for one in made.callback_handler.callbacks if isinstance(one, SavesEarly))
    early.made = made
    made.train()
    resume = f"{tmp_path}/checkpoint-{INFLATE}"
    assert fit(bert(5), tmp_path / "again", resume=resume)[-16:] == losses(made)[-16:]


def test_two_schedules_of_one_model_are_refused(tmp_path: Path) -> None:
    made, _ = trainer(bert(), tmp_path)
    made.add_callback(DynamicRankCallback(schedule("low-rank"), layers="*output*"))
    with pytest.raises(ValueError, match="the Trainer has 2 DynamicRankCallbacks"):
        made.train()
    assert not any(isinstance(one, RankedLayer) for one in made.model.modules())


def test_a_schedule_that_follows_the_learning_rate_has_its_forecast(tmp_path: Path) -> None:
    callback = DynamicRankCallback(dr.schedules.dynamic_rank(4))
    made, _ = trainer(bert(), tmp_path, callback, lr_scheduler_type="cosine")
    made.train()
    rates = callback.ranks.forecast.rates
    assert rates[0] == 1e-2 and rates[500] == pytest.approx(5e-3, rel=0.1) and rates[-1] < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"moments": "calibrated"},
        {"callbacks": [dr.LRRewarmup(2)]},
        {"schedule": dr.schedules.cuttlefish(1, window=2, recent=2, threshold=1.0)},
        {"schedule": dr.schedules.decay(end=0.36, cuts=[5, 12])},
    ],
    ids=["calibrated", "rewarm", "closed loop", "budgets"],
)
def test_what_the_rank_scheduler_keeps_survives(options: dict[str, Any], tmp_path: Path) -> None:
    def callback() -> DynamicRankCallback:
        given = {"schedule": schedule("low-rank"), **options}
        return DynamicRankCallback(**given)

    whole = fit(bert(), tmp_path, callback(), save_strategy="steps", save_steps=7)
    for step in (7, 14):
        again = fit(bert(5), tmp_path / "b", callback(), resume=f"{tmp_path}/checkpoint-{step}")
        assert again == whole


class Best:
    """The metric is best at one evaluation."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, _: Any) -> dict[str, float]:
        self.calls += 4
        return {"good": float(self.calls == self.at)}


@pytest.mark.parametrize(
    ("at", "to"), [(4, "low-rank"), (12, "low-rank"), (12, "adapted"), (20, "adapted")]
)
def test_the_best_model_is_loaded_whole(at: int, to: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "good"}
    how["trainer_compute_metrics"] = Best(at)
    made, _ = trainer(bert(), tmp_path, to, **how, **EVALUATED, **SAVED)
    made.train()
    best = type(made.model).from_pretrained(f"{tmp_path}/checkpoint-{at}").eval()
    assert form_of(made.model) is forms_at(at, to)
    found, wanted = made.model.state_dict(), best.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert made.predict(rows(bert(), 8)).predictions.shape == (8, 4)
    assert made.evaluate()["eval_good"] == 0.0


def test_there_is_no_rank_scheduler_before_training() -> None:
    callback = DynamicRankCallback(dr.schedules.dynamic_rank(rank=0.25))
    with pytest.raises(RuntimeError, match="no rank scheduler yet: "):
        _ = callback.ranks


def test_the_same_trainer_trains_again(saved: Path, tmp_path: Path) -> None:
    made, callback = trainer(bert(), tmp_path)
    made.train()
    first, ranks = losses(made), callback.ranks
    made.train()  # a new run, of the model as it is
    assert callback.ranks is not ranks
    assert callback.ranks.last_step == 24 and losses(made) != first
    made.train(resume_from_checkpoint=f"{saved}/checkpoint-12")
    assert losses(made) == first


def test_a_model_of_model_init_resumes_too(plain: list[float], saved: Path, tmp_path: Path) -> None:
    for make in (lambda: bert(5), lambda trial: bert(5)):
        data = rows(bert())
        made, _ = trainer(None, tmp_path, data=data, trainer_model_init=make)
        made.train(resume_from_checkpoint=f"{saved}/checkpoint-20")
        assert losses(made) == near(plain)


def test_each_trial_of_a_search_is_a_run(tmp_path: Path) -> None:
    made, callback = trainer(None, tmp_path, data=rows(bert()), trainer_model_init=lambda: bert())
    found = []
    for _ in range(2):  # as hyperparameter_search does
        made.train(trial=None)
        found.append(losses(made))
    assert found[0] == found[1]
    assert callback.ranks.model is made.model


def test_a_run_that_did_not_fit_the_memory_begins_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(outputs: Any, labels: Any, **_: Any) -> Any:
        calls.append(len(labels))
        if len(labels) > 2 and len(calls) == 3:
            raise RuntimeError("CUDA out of memory.")
        return cross_entropy(outputs, labels)

    how = {"auto_find_batch_size": True, "trainer_compute_loss_func": loss}
    made, callback = trainer(bert(), tmp_path, **how)
    made.train()
    assert callback.ranks.last_step == 24
    assert form_of(made.model) is dr.Adapted
    assert "saved_forms" not in made.model.state_dict()  # the hooks of both attempts are gone


def test_a_run_may_end_early(tmp_path: Path) -> None:
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    how: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "good"}
    how |= {"trainer_compute_metrics": Best(4), "trainer_callbacks": [stop]}
    made, callback = trainer(bert(), tmp_path, **how, **EVALUATED, **SAVED)
    made.train()
    assert made.state.global_step == 12 and form_of(made.model) is dr.LowRank
    assert callback.ranks.last_step == 12


def test_an_optimizer_whose_state_cannot_move_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    made, _ = trainer(bert(), tmp_path, optim="adafactor")
    with pytest.raises(ValueError, match=r"Adafactor: .*exp_avg_sq_row.*moments='reset'"):
        made.train()
    assert made.state.global_step == 0
    callback = DynamicRankCallback(schedule(), moments="reset")
    assert len(fit(bert(), tmp_path, callback, optim="adafactor")) == 24


@pytest.mark.parametrize("given", [{"fsdp": "full_shard"}, {"deepspeed": {"stage": 3}}], ids=str)
def test_sharded_trainers_are_refused(given: dict[str, Any]) -> None:
    args = SimpleNamespace(**{"fsdp": "", "deepspeed": None, **given})
    with pytest.raises(ValueError, match=f"runs under {next(iter(given))}, .*DDP works"):
        DynamicRankCallback(schedule()).on_init_end(args, None, None, model=bert())


def test_an_accelerator_that_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = SimpleNamespace(distributed_type=DistributedType.FSDP)  # by accelerate launch
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: launched)
    args = SimpleNamespace(fsdp="", deepspeed=None)
    with pytest.raises(ValueError, match=r"runs under FSDP, .*DDP works"):
        DynamicRankCallback(schedule()).on_init_end(args, None, None, model=bert())


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_adapters_of_peft_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="PEFT adapters"):
        trainer(get_peft_model(bert(), lora), tmp_path, data=rows(bert()))
    injected = bert()
    injected._hf_peft_config_loaded = True  # as by injected.add_adapter(lora)
    with pytest.raises(ValueError, match="PEFT adapters"):
        trainer(injected, tmp_path)


def damaged(saved: Path, to: Path, step: int = 12) -> Path:
    return Path(shutil.copytree(saved / f"checkpoint-{step}", to / f"checkpoint-{step}"))


def test_a_checkpoint_without_a_rank_schedule_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path)
    (folder / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"step 12 has no state of a rank schedule"):
        fit(bert(5), tmp_path, resume=str(folder))
    made = Trainer(bert(), trainer(bert(), tmp_path, **SAVED)[0].args, train_dataset=rows(bert()))
    made.args.max_steps = 4
    made.train()
    with pytest.raises(ValueError, match=r"step 4 has no state .*from_pretrained"):
        fit(bert(5), tmp_path, resume=f"{tmp_path}/checkpoint-4")


def test_files_of_different_steps_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path)
    shutil.copy(saved / "checkpoint-8" / "optimizer.pt", folder)
    with pytest.raises(ValueError, match=r"optimizer.pt is of step 8, trainer_state.json of step"):
        fit(bert(5), tmp_path, resume=str(folder))
    folder = damaged(saved, tmp_path, 20)
    shutil.copy(saved / "checkpoint-12" / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"not those of step 20|group that doesn't match"):
        fit(bert(5), tmp_path, resume=str(folder))


def test_the_state_of_another_run_is_refused(saved: Path, tmp_path: Path) -> None:
    resume = f"{saved}/checkpoint-12"
    with pytest.raises(ValueError, match="followed the schedule"):
        fit(bert(5), tmp_path, "low-rank", resume=resume)
    with pytest.raises(ValueError, match="a run of 24 steps, this one has 48"):
        fit(bert(5), tmp_path, resume=resume, max_steps=48, data=rows(bert(), 192))


def test_a_callback_that_came_late_cannot_resume(saved: Path, tmp_path: Path) -> None:
    args = trainer(bert(5), tmp_path)[0].args
    made = Trainer(bert(5), args, train_dataset=rows(bert()))
    made.add_callback(DynamicRankCallback(schedule()))
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):  # torch's
        made.train(resume_from_checkpoint=f"{saved}/checkpoint-20")
    made.train()  # a new run needs no hook before it
    assert form_of(made.model) is dr.Adapted


def test_states_are_matched_by_name(saved: Path, tmp_path: Path) -> None:
    """torch numbers parameters by their order in the groups, which may be another one."""
    whole = fit(bert(), tmp_path)
    made, _ = trainer(bert(5), tmp_path)
    plain = made.create_optimizer

    def reversed_groups(model: Any = None) -> Any:
        optimizer = plain(model)
        for group in optimizer.param_groups:
            group["params"].reverse()
        return optimizer

    made.create_optimizer = reversed_groups  # type: ignore[method-assign]
    made.train(resume_from_checkpoint=f"{saved}/checkpoint-12")
    assert losses(made) == near(whole)


def test_what_a_checkpoint_holds_is_read_without_pickle(saved: Path) -> None:
    state = torch.load(saved / "checkpoint-4" / "optimizer.pt", weights_only=True)
    entry = state["param_groups"][0]["dynarank"]
    assert entry["step"] == entry["ranks"]["last_step"] == 4 < INFLATE
    json.dumps(entry)
