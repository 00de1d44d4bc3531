"""Accelerate's save_state and load_state keep the rank scheduler, in every form."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from weakref import ref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ProjectConfiguration
from host_runs import (
    CHANGES,
    ENDINGS,
    POSITIONS,
    STEPS,
    adamw,
    batches,
    forms_at,
    loss_of,
    mlp,
    plain_losses,
    ranks_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import dynarank as dr
from dynarank.integrations.accelerate import attach

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def fresh(**more: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **more)


class Run:
    """A loop as Accelerate's users write it."""

    def __init__(
        self,
        to: str = "adapted",
        *,
        seed: int = 0,
        accumulate: int = 1,
        precision: str = "no",
        start: Callable[[nn.Module], object] = lambda model: None,
        scheduled: Callable[..., Any] = ranks_of,
        scaler: Any = None,
        attached: bool = True,
        **more: Any,
    ) -> None:
        self.accumulate, self.to_form = accumulate, to
        how = {"gradient_accumulation_steps": accumulate, "mixed_precision": precision}
        self.accelerator = fresh(**how, **more)
        if scaler is not None:
            self.accelerator.scaler = scaler
        model = mlp(seed)
        start(model)
        own = adamw(model)
        given = self.accelerator.prepare(model, own, LinearLR(own, 1.0, 0.1, STEPS))
        self.model, self.optimizer, self.rates = given
        self.ranks = scheduled(self.model, self.optimizer, to, lr_scheduler=self.rates)
        if attached:
            attach(self.accelerator, self.ranks)

    def forms(self) -> set[type]:
        plan = dr.current_plan(self.model)
        return {type(plan[path]) for path in self.ranks.layers}

    def train(self, end: int = STEPS, save: Path | None = None, **how: Any) -> list[float]:
        """Train up to a step, saving at the positions; the losses of these batches."""
        own, losses = self.accelerator, list[float]()
        first, last = (step * self.accumulate for step in (self.ranks.last_step, end))
        for batch in batches(STEPS * self.accumulate)[first:last]:
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
                own.save_state(f"{save}/{self.ranks.last_step}", **how)
        return losses

    def state(self) -> Any:
        """All that a refused load must leave as it was."""
        tensors = {name: one.clone() for name, one in self.model.state_dict().items()}
        states = self.optimizer.state_dict()["state"], self.rates.state_dict()
        return repr((tensors, states, self.ranks.state_dict(), torch.get_rng_state().sum()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[float], Path]]:
    """The losses of a run, and the folders that it saved, by its arguments."""
    made: dict[str, tuple[list[float], Path]] = {}

    def of(*args: Any, how: Any = None, **more: Any) -> tuple[list[float], Path]:
        key = f"{args} {how} {more}"
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            made[key] = Run(*args, **more).train(save=folder, **(how or {})), folder
        return made[key]

    return of


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
    assert run.train() == losses[at * accumulate :]


STARTS: dict[str, Callable[[nn.Module], object]] = {
    "low-rank": lambda model: dr.factorize(model, 2),
    "full-rank": lambda model: dr.inflate(dr.factorize(model, 2)),
    "adapted": lambda model: dr.deflate(dr.factorize(model, 6), to="adapted"),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("at", POSITIONS)
def test_the_model_may_have_any_form_before(saved: Any, start: str, at: int) -> None:
    def scheduled(model: Any, optimizer: Any, to: str, **more: Any) -> Any:
        return ranks_of(model, optimizer, to, layers=["0", "2"], **more)

    losses, folder = saved()
    run = Run(seed=9, start=STARTS[start], scheduled=scheduled)
    run.accelerator.load_state(f"{folder}/{at}")
    assert run.train() == losses[at:]


def test_a_run_goes_back_in_its_own_process(saved: Any) -> None:
    losses, folder = saved()
    run = Run()
    run.train()
    for at in (16, 8, 20, 4):
        run.accelerator.load_state(f"{folder}/{at}")
        assert run.train() == losses[at:]


@pytest.mark.parametrize("to", ENDINGS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_equals_the_plain_one(to: str, accumulate: int) -> None:
    """As Accelerate's documentation shows it: each call beside the optimizer's."""
    accelerator = fresh(gradient_accumulation_steps=accumulate)
    model = mlp()
    model, optimizer = accelerator.prepare(model, adamw(model))
    ranks, losses = ranks_of(model, optimizer, to), list[float]()
    attach(accelerator, ranks)
    for batch in batches(STEPS * accumulate):
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            ranks.step()
            optimizer.zero_grad()
    assert losses == plain_losses(to, accumulate=accumulate)


class Zoo(nn.Module):
    """Layers of many kinds; the output layer is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.embedding(x).transpose(1, 2)).transpose(1, 2)
        h, _ = self.lstm(h)
        h, _ = self.attention(h, h, h)
        return self.head(h)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("to", ENDINGS)
def test_layers_of_many_kinds_in_both_formats(tmp_path: Path, to: Any, safe: bool) -> None:
    schedule = dr.schedules.dynamic_rank(2, inflate=2, deflate=4, to=to)
    layers = ["embedding", "conv", "lstm.weight_hh_l0", "attention.*"]
    tokens = torch.randint(0, 32, (6, 4, 5), generator=torch.Generator().manual_seed(1))

    def run(seed: int, folder: str = "") -> list[float]:
        accelerator, losses = fresh(), list[float]()
        torch.manual_seed(seed)
        model = Zoo()
        model, optimizer = accelerator.prepare(model, adamw(model))
        ranks = dr.RankScheduler(model, optimizer, schedule, 6, layers=layers)
        attach(accelerator, ranks)
        if folder:
            accelerator.load_state(folder)
        for x in tokens[ranks.last_step :]:
            loss = nn.functional.cross_entropy(model(x).transpose(1, 2), x)
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            ranks.step()
            if not folder:
                accelerator.save_state(f"{tmp_path}/{ranks.last_step}", safe_serialization=safe)
        return losses

    losses = run(0)
    for at in (1, 2, 3, 4, 5):
        assert run(9, f"{tmp_path}/{at}") == losses[at:]


def calibrated(model: Any, optimizer: Any, to: str, **more: Any) -> Any:
    return ranks_of(model, optimizer, to, moments="calibrated", **more)


def rewarmed(model: Any, optimizer: Any, to: str, **more: Any) -> Any:
    return ranks_of(model, optimizer, to, callbacks=[dr.LRRewarmup(3)], **more)


def closed_loop(model: Any, optimizer: Any, to: str, **more: Any) -> Any:
    schedule = dr.schedules.cuttlefish()
    return dr.RankScheduler(model, optimizer, schedule, STEPS, layers=["0", "2"], **more)


def following(model: Any, optimizer: Any, to: str, **more: Any) -> Any:
    """Its transition points follow the learning rate."""
    return dr.RankScheduler(model, optimizer, dr.schedules.dynamic_rank(4), STEPS, **more)


@pytest.mark.parametrize("scheduled", [calibrated, rewarmed, closed_loop, following])
def test_every_state_of_the_rank_scheduler_is_kept(saved: Any, scheduled: Any) -> None:
    losses, folder = saved(scheduled=scheduled)
    for at in (4, 8, 12, 20):
        run = Run(seed=9, scheduled=scheduled)
        run.accelerator.load_state(f"{folder}/{at}")
        assert run.train() == losses[at:]
    assert not list(folder.rglob("dynarank/*.p*"))  # nothing is pickled


def test_gradients_that_are_kept_are_in_the_folder(saved: Any) -> None:
    _, folder = saved(scheduled=calibrated)
    assert (folder / "4/dynarank/ranks.safetensors").stat().st_size > 1000


def test_steps_that_the_scaler_skips_are_not_counted(tmp_path: Path) -> None:
    def run(folder: str = "") -> tuple[list[int], Run]:
        own = Run(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), seed=9 if folder else 0)
        if folder:
            own.accelerator.load_state(folder)
        changed: list[int] = []
        for number, batch in enumerate(batches(30)):
            overflows = not folder and number in (2, 3, 9, 17, 20, 21)
            loss = loss_of(own.model, batch) * (float("inf") if overflows else 1.0)
            own.accelerator.backward(loss)
            own.optimizer.step()
            assert own.optimizer.step_was_skipped == overflows
            own.rates.step()
            own.optimizer.zero_grad()
            if own.ranks.step():
                changed.append(number)
            if own.ranks.last_step in (STEPS, 12) and not folder:
                own.accelerator.save_state(f"{tmp_path}/{own.ranks.last_step}")
        return changed, own

    changed, own = run()
    assert own.ranks.last_step == STEPS
    assert changed == [CHANGES[0] + 2, CHANGES[1] + 3]  # after 3 and 4 skipped steps
    _, resumed = run(f"{tmp_path}/12")
    assert resumed.accelerator.scaler is not None and own.accelerator.scaler is not None
    assert resumed.ranks.last_step == 12 + 30


@pytest.mark.parametrize("attached", [False, True])
def test_a_registered_rank_scheduler_is_right_too(tmp_path: Path, attached: bool) -> None:
    def registered(**more: Any) -> Run:
        run = Run(attached=attached, **more)
        run.accelerator.register_for_checkpointing(run.ranks)
        return run

    losses = registered().train(save=tmp_path)
    for at in POSITIONS:
        run = registered(seed=9)
        with pytest.warns() if at in (8, 12) and not attached else nullcontext():
            run.accelerator.load_state(f"{tmp_path}/{at}")  # its forms are not known yet
        assert run.train() == losses[at:]


@pytest.mark.parametrize("backend", ["no", "eager"])
def test_a_compiled_model(saved: Any, backend: str) -> None:
    losses, folder = saved(dynamo_backend=backend)
    assert losses == saved()[0]
    run = Run(seed=9, dynamo_backend=backend)
    run.accelerator.load_state(f"{folder}/12")
    assert run.train() == losses[12:]


def test_checkpoints_that_accelerate_names(tmp_path: Path) -> None:
    def config() -> ProjectConfiguration:
        more: Any = {"automatic_checkpoint_naming": True, "total_limit": 2}
        return ProjectConfiguration(str(tmp_path), **more)

    run, losses = Run(project_config=config()), list[float]()
    for at in (4, 12, 20):
        losses += run.train(at)
        run.accelerator.save_state()
    losses += run.train()
    assert len(os.listdir(tmp_path / "checkpoints")) == 2
    resumed = Run(seed=9, project_config=config())
    resumed.accelerator.load_state()
    assert resumed.train() == losses[20:]


class Several:
    """Three models in one accelerator; two are ranked."""

    def __init__(self, seed: int = 0, order: tuple[int, ...] = (0, 1)) -> None:
        self.accelerator = fresh()
        models = [mlp(seed + i) for i in range(3)]
        given = self.accelerator.prepare(*models, *map(adamw, models))
        self.models, self.optimizers = given[:3], given[3:]
        pairs = zip(self.models[1:], self.optimizers[1:], ENDINGS, strict=True)
        self.ranks = [ranks_of(*one) for one in pairs]
        self.handles = [attach(self.accelerator, self.ranks[i]) for i in order]

    def train(self, save: Path | None = None) -> list[float]:
        losses: list[float] = []
        for batch in batches()[self.ranks[0].last_step :]:
            for model, optimizer in zip(self.models, self.optimizers, strict=True):
                loss = loss_of(model, batch)
                losses.append(loss.item())
                self.accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            for ranks in self.ranks:
                ranks.step()
            if save is not None:
                self.accelerator.save_state(f"{save}/{self.ranks[0].last_step}")
        return losses


def test_several_models_of_one_accelerator(tmp_path: Path) -> None:
    losses = Several().train(tmp_path)
    found = {path.name for path in (tmp_path / "12").glob("dynarank*")}
    assert found == {"dynarank_1", "dynarank_2"}  # as model_1.safetensors
    for at in POSITIONS:
        run = Several(20, order=(1, 0))
        run.accelerator.load_state(f"{tmp_path}/{at}")
        assert run.train() == losses[3 * at :]
    one = Several(20, order=(1,))
    with pytest.raises(ValueError, match=r"\['dynarank_1', 'dynarank_2'\], this accelerator"):
        one.accelerator.load_state(f"{tmp_path}/12")
    assert [ranks.last_step for ranks in one.ranks] == [0, 0]


def test_all_rank_schedulers_load_or_none(tmp_path: Path) -> None:
    Several().train(tmp_path)
    damage(tmp_path / "20/model_2.safetensors")
    run = Several(20)
    before = [dr.current_plan(model) for model in run.models]
    with pytest.raises(ValueError, match=r"model_2\.safetensors"):
        run.accelerator.load_state(f"{tmp_path}/20")
    assert [ranks.last_step for ranks in run.ranks] == [0, 0]
    assert [dr.current_plan(model) for model in run.models] == before


def test_two_rank_schedulers_of_one_model(tmp_path: Path) -> None:
    accelerator, model = fresh(), mlp()
    model, optimizer = accelerator.prepare(model, adamw(model))
    both = [ranks_of(model, optimizer, layers=[path]) for path in ("0", "2")]
    for ranks in both:
        attach(accelerator, ranks)
    both[1].last_step = 3
    accelerator.save_state(str(tmp_path))
    both[1].last_step = 5
    accelerator.load_state(str(tmp_path))
    assert [ranks.last_step for ranks in both] == [0, 3]


def test_attach_before_prepare_and_twice(saved: Any, tmp_path: Path) -> None:
    losses, folder = saved()
    accelerator = fresh()
    model = mlp(9)
    optimizer = adamw(model)
    rates = LinearLR(optimizer, 1.0, 0.1, STEPS)
    ranks = ranks_of(model, optimizer, lr_scheduler=rates)
    for _ in range(2):
        attach(accelerator, ranks)
    for call in (accelerator.save_state, accelerator.load_state):
        with pytest.raises(ValueError, match=r"accelerator\.prepare first"):
            call(f"{folder}/12" if call == accelerator.load_state else str(tmp_path / "no"))
    run = Run()
    run.accelerator, run.ranks = accelerator, ranks
    run.model, run.optimizer, run.rates = accelerator.prepare(model, optimizer, rates)
    accelerator.load_state(f"{folder}/12")
    assert run.train() == losses[12:]


def test_a_detached_rank_scheduler_is_left_alone(tmp_path: Path) -> None:
    run = Several()
    for handle in run.handles:
        handle.remove()
    run.accelerator.save_state(str(tmp_path))
    assert not list(tmp_path.glob("dynarank*"))
    assert not run.accelerator._save_model_state_pre_hook
    assert not run.accelerator._load_model_state_pre_hook
    attach(run.accelerator, run.ranks[0])
    run.handles[0].remove()  # of before
    run.accelerator.save_state(str(tmp_path))
    assert [path.name for path in tmp_path.glob("dynarank*")] == ["dynarank_1"]


def test_free_memory_lets_go(tmp_path: Path) -> None:
    run = Run()
    run.train(10)
    accelerator, held = run.accelerator, (ref(run.ranks), ref(run.model))
    accelerator.free_memory()
    accelerator.save_state(str(tmp_path / "none"))
    model = mlp()
    model, optimizer = accelerator.prepare(model, adamw(model))
    ranks = ranks_of(model, optimizer)
    attach(accelerator, ranks)
    accelerator.save_state(str(tmp_path / "new"))
    accelerator.load_state(str(tmp_path / "new"))
    assert [path.name for path in tmp_path.glob("*/dynarank*")] == ["dynarank"]
    del run
    gc.collect()
    assert [one() for one in held] == [None, None]


def test_the_model_is_saved_with_its_forms(tmp_path: Path) -> None:
    run = Run()
    run.train(20)
    run.accelerator.save_model(run.model, str(tmp_path))
    other = mlp(9)
    ranks_of(other, adamw(other))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    inputs = batches(1)[0][0]
    assert torch.equal(other(inputs), run.accelerator.unwrap_model(run.model)(inputs))
    assert dr.current_plan(other) == dr.current_plan(run.model)
    third = mlp(9)
    ranks_of(third, adamw(third))
    third.load_state_dict(run.accelerator.get_state_dict(run.model))
    assert torch.equal(other(inputs), third(inputs))


OPTIMIZERS = ["NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adafactor", "SGD", "Rprop"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_prepared_optimizer_is_checked_and_moved_as_a_plain_one(name: str) -> None:
    def train(prepare: Callable[..., Any]) -> object:
        model = mlp()
        own = getattr(torch.optim, name)(model.parameters(), lr=1e-2)
        try:
            return plain_losses(model=model, optimizers=lambda _: [prepare(own)])
        except ValueError as error:
            return str(error)

    found = train(fresh().prepare)
    assert found == train(lambda own: own)
    assert isinstance(found, str) == (name == "Rprop")


def damage(path: Path, how: str = "cut") -> None:
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        pickled = data.find(b"\x80\x02")  # torch's archives have padding in the middle
        data[pickled + 12 if pickled > 0 else len(data) // 2] ^= 8
        path.write_bytes(data)


FILES = ["dynarank/ranks.json", "dynarank/MANIFEST.json", "model.safetensors", "optimizer.bin"]
FILES += ["scheduler.bin", "random_states_0.pkl", "scaler.pt", "pytorch_model.bin"]


@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_by_name(saved: Any, tmp_path: Path, name: str, how: str) -> None:
    scaler = torch.amp.GradScaler("cpu") if name == "scaler.pt" else None
    save = {"safe_serialization": name != "pytorch_model.bin"}
    run = Run(scaler=scaler)
    run.train(20)
    run.accelerator.save_state(str(tmp_path), **save)
    other = Run(seed=9, scaler=scaler)
    before = other.state()
    damage(tmp_path / name, how)
    if (name, how) == ("random_states_0.pkl", "gone"):
        other.accelerator.load_state(str(tmp_path))  # as of fewer processes
        return
    known = name.partition("/")[0] if how == "gone" else name
    with pytest.raises(ValueError, match=known.replace("model.safetensors", "model")):
        other.accelerator.load_state(str(tmp_path))
    assert other.state() == before


def of_more_steps(model: Any, optimizer: Any, to: str, **more: Any) -> Any:
    return dr.RankScheduler(model, optimizer, dr.schedules.dynamic_rank(4), 30, **more)


def grown(model: nn.Module) -> None:
    cast(Any, model)[4] = nn.Linear(32, 5)


def wider(model: nn.Module) -> None:
    cast(Any, model)[0], cast(Any, model)[2] = nn.Linear(16, 48), nn.Linear(48, 32)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"to": "low-rank"}, "12/dynarank: the saved run followed the schedule"),
        ({"scheduled": of_more_steps}, "a run of 24 steps, this one has 30"),
        ({"scheduled": calibrated}, ""),
        ({"start": wider}, r"'0': \[32, 16\].*'0': \[48, 16\]"),
        ({"start": grown}, r"'4.bias' has the shape \(4,\), and \(5,\)"),
    ],
)
def test_the_state_of_another_run_is_refused(saved: Any, how: Any, says: str) -> None:
    _, folder = saved()
    run = Run(seed=9, **how)
    before = run.state()
    if not says:
        return run.accelerator.load_state(f"{folder}/12")  # gradients are kept from now on
    with pytest.raises(ValueError, match=says):
        run.accelerator.load_state(f"{folder}/12")
    assert run.state() == before


def test_a_folder_without_a_rank_scheduler_is_refused(tmp_path: Path) -> None:
    Run(attached=False).accelerator.save_state(str(tmp_path))
    run = Run(seed=9)
    before = run.state()
    with pytest.raises(ValueError, match=r"saved without attach\(accelerator, ranks\)"):
        run.accelerator.load_state(str(tmp_path))
    assert run.state() == before


def test_another_number_of_groups_is_refused(saved: Any) -> None:
    _, folder = saved()
    run = Run(seed=9)
    run.optimizer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    before = run.state()
    with pytest.raises(ValueError, match=r"optimizer\.bin has 1 parameter groups, .* 2"):
        run.accelerator.load_state(f"{folder}/12")
    assert run.state() == before


def test_weights_that_ddp_has_named_are_refused(saved: Any, tmp_path: Path) -> None:
    _, folder = saved()
    shutil.copytree(folder / "12", tmp_path / "12")
    path = tmp_path / "12/model.safetensors"
    save_file({f"module.{name}": one for name, one in load_file(path).items()}, path)
    run = Run(seed=9)
    before = run.state()
    with pytest.raises(ValueError, match=r"'module\.0\.bias', the model '0\.bias'.*processes"):
        run.accelerator.load_state(str(tmp_path / "12"))
    assert run.state() == before


def test_files_of_two_saves_are_refused(saved: Any, tmp_path: Path) -> None:
    """As of a save that was cut, into the folder of an older one."""
    _, folder = saved()
    shutil.copytree(folder / "20", tmp_path / "20")
    shutil.rmtree(tmp_path / "20/dynarank")
    shutil.copytree(folder / "4/dynarank", tmp_path / "20/dynarank")
    run = Run(seed=9)
    before = run.state()
    with pytest.raises(ValueError, match="not the one that was saved with the rank scheduler"):
        run.accelerator.load_state(str(tmp_path / "20"))
    assert run.state() == before


def test_hooks_that_save_the_weights_themselves(tmp_path: Path) -> None:
    """As in the scripts of diffusers: they take the models out of Accelerate's lists."""

    def hooked(seed: int = 0) -> Run:
        run = Run(seed=seed)

        def save(models: Any, weights: Any, folder: str) -> None:
            torch.save(weights.pop(), f"{folder}/own.pt")

        def load(models: Any, folder: str) -> None:
            models.pop().load_state_dict(torch.load(f"{folder}/own.pt"))

        run.accelerator.register_save_state_pre_hook(save)
        run.accelerator.register_load_state_pre_hook(load)
        return run

    losses = hooked().train(save=tmp_path)
    run = hooked(9)
    run.accelerator.load_state(f"{tmp_path}/20")
    assert run.train() == losses[20:]


def test_without_accelerate_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    ranks = ranks_of(model, adamw(model))
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install .*\[accelerate\]"):
        attach(None, ranks)


def test_other_objects_are_refused() -> None:
    run = Run(attached=False)
    with pytest.raises(TypeError, match=r"takes an? Accelerator, got a Sequential"):
        attach(run.model, run.ranks)
    with pytest.raises(TypeError, match=r"takes an? RankScheduler, got a Sequential"):
        attach(run.accelerator, cast(Any, run.model))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
def test_flat_buffers_are_refused(kind: str) -> None:
    run = Run(attached=False)
    shared = cast(Any, AcceleratorState._shared_state)
    shared["distributed_type"] = DistributedType[kind]
    shared["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match="cannot follow a change of form: use DDP or FSDP2"):
        attach(run.accelerator, run.ranks)
