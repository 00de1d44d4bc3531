from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_run import assert_same_bits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dynarank as dr
from dynarank import RankScheduler
from dynarank.checkpoint.folder import Contents, write_folder
from dynarank.checkpoint.snapshot import restore, take
from dynarank.schedules import dynamic_rank

# A training state saved and loaded is the training state: the run that goes on is the same run.

STEPS = 12
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
}


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    first = [nn.Conv2d(2, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)]
    last = [nn.Linear(24 * 4, 24), nn.ReLU(), nn.Linear(24, 4)]
    return nn.Sequential(*first, *last).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Running:
    """A whole run, with everything that people have."""

    def __init__(self, to: Any, optimizer: str, seed: int = 0) -> None:
        self.model = net(seed)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [5, 9])
        schedule = dynamic_rank(3, inflate=4, deflate=8, to=to)
        self.ranks = RankScheduler(self.model, self.optimizer, schedule, STEPS, layers=["0", "5"])
        self.ema: Any = {"momentum": 0.9, "loss": torch.zeros(())}
        self.scaler: Any = None

    def parts(self) -> dict[str, Any]:
        return vars(self)

    def step(self, step: int) -> float:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 4, 4, generator=generator)
        loss = F.cross_entropy(self.model(x), torch.arange(8) % 4)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        self.ranks.step()
        self.ema["loss"] = 0.9 * self.ema["loss"] + 0.1 * loss.detach()
        return loss.item()

    def steps(self, start: int, stop: int = STEPS) -> list[float]:
        return [self.step(step) for step in range(start, stop)]

    def state(self) -> list[Any]:
        return [copy.deepcopy(one.state_dict()) for one in (self.model, self.optimizer, self.ranks)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("to", ["adapted", "low-rank"])
def test_a_run_loaded_from_any_step_is_the_run_uninterrupted(
    to: str, optimizer: str, tmp_path: Path
) -> None:
    whole, losses = Running(to, optimizer), []
    for step in range(STEPS):
        dr.save(tmp_path / str(step), **whole.parts(), extra={"step": step})
        losses.append(whole.step(step))
    for step in range(STEPS):
        resumed = Running(to, optimizer, seed=7)  # nothing of its own may matter
        extra = dr.load(tmp_path / str(step), **resumed.parts())
        assert resumed.steps(extra["step"]) == losses[step:]
        assert_same_bits(resumed.state(), whole.state())
        assert torch.equal(resumed.ema["loss"], whole.ema["loss"])
    assert len(set(losses)) == STEPS


def test_loading_a_state_onto_itself_changes_nothing(tmp_path: Path) -> None:
    run = Running("adapted", "adamw")
    for step in range(STEPS):
        parameters, state = list(run.model.parameters()), run.state()
        dr.load(dr.save(tmp_path / "last", **run.parts()), **run.parts())
        assert all(a is b for a, b in zip(parameters, run.model.parameters(), strict=True))
        assert_same_bits(run.state(), state)
        run.step(step)


def test_a_plain_model_gets_the_saved_forms(tmp_path: Path) -> None:
    model = dr.deflate(dr.inflate(dr.factorize(net(0), 3)), alpha=2.0, execution="two-branch")
    dr.save(tmp_path / "model", model=model)
    fresh = net(1)
    dr.load(tmp_path / "model", model=fresh)
    assert dr.current_plan(fresh) == dr.current_plan(model)
    assert_same_bits(fresh.state_dict(), model.state_dict())
    assert [p.requires_grad for p in fresh.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_what_was_frozen_is_frozen(tmp_path: Path) -> None:
    model = dr.factorize(net(0), 3, layers=["0", "5"])
    model[0].requires_grad_(False)
    model[5].down.requires_grad_(False)  # type: ignore[union-attr]
    dr.save(tmp_path / "model", model=model)
    fresh = net(1)
    dr.load(tmp_path / "model", model=fresh)
    trains = {name: p.requires_grad for name, p in fresh.named_parameters()}
    assert trains == {name: p.requires_grad for name, p in model.named_parameters()}
    dr.deflate(dr.inflate(fresh, layers=["5"]), 2, layers=["5"], to="low-rank")
    assert not fresh[5].down.requires_grad  # type: ignore[union-attr]


def test_an_average_is_saved_in_its_forms_and_loaded_into_them(tmp_path: Path) -> None:
    model = dr.factorize(net(0), 3)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.update_parameters(model)
    dr.save(tmp_path / "run", model=model, ema=ema)
    fresh = net(1)
    average = AveragedModel(fresh, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    dr.load(tmp_path / "run", model=fresh, ema=average)
    assert_same_bits(average.state_dict(), ema.state_dict())
    average.update_parameters(fresh)
    ema.update_parameters(model)
    assert_same_bits(average.state_dict(), ema.state_dict())


def test_gradients_of_an_unfinished_accumulation_are_saved(tmp_path: Path) -> None:
    model = net(0)
    model(torch.ones(8, 2, 4, 4)).sum().backward()
    dr.save(tmp_path / "run", model=model)
    fresh = net(1)
    dr.load(tmp_path / "run", model=fresh)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad) and p.grad.stride() == q.grad.stride()
    model.zero_grad(set_to_none=False)
    dr.save(tmp_path / "run", model=model)
    dr.load(tmp_path / "run", model=fresh)
    assert all(p.grad is None for p in fresh.parameters())


def two_groups(model: nn.Module, *, swapped: bool) -> Optimizer:
    named = dict(model.named_parameters())
    weights = [p for p in named.values() if p.ndim > 1]
    others = [p for p in named.values() if p.ndim == 1]
    groups = [{"params": weights, "lr": 0.1}, {"params": others, "lr": 0.01}]
    if swapped:
        groups = [{"params": others[::-1], "lr": 7.0}, {"params": weights[::-1], "lr": 7.0}]
    return torch.optim.AdamW(groups)  # type: ignore[arg-type]


def test_a_state_is_loaded_by_the_names_of_the_parameters_not_by_their_order(
    tmp_path: Path,
) -> None:
    """torch would load it into the wrong ones, where shapes agree without a word."""
    model = net(0)
    optimizer = two_groups(model, swapped=False)
    model(torch.ones(8, 2, 4, 4)).sum().backward()
    optimizer.step()
    dr.save(tmp_path / "run", model=model, optimizer=optimizer)
    fresh = net(1)
    other = two_groups(fresh, swapped=True)
    dr.load(tmp_path / "run", model=fresh, optimizer=other)
    assert_same_bits(other.state_dict(), optimizer.state_dict())
    named = dict(fresh.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(other.state[named[name]]["exp_avg"], optimizer.state[p]["exp_avg"])
        assert other.state[named[name]]["exp_avg"].stride() == p.stride()


def refused(change: Callable[[nn.Module], Any], message: str, tmp_path: Path, **more: Any) -> None:
    """Loading is refused, and nothing has changed."""
    model = dr.factorize(net(0), 3, layers=["5"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(8, 2, 4, 4)).sum().backward()
    optimizer.step()
    dr.save(tmp_path / "run", model=model, optimizer=optimizer)
    fresh = net(1)
    fresh, other = change(fresh)
    before = [copy.deepcopy(fresh.state_dict()), copy.deepcopy(other.state_dict())]
    objects = [id(p) for p in fresh.parameters()]
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        dr.load(tmp_path / "run", model=fresh, optimizer=other, **more)
    assert_same_bits([fresh.state_dict(), other.state_dict()], before)
    assert [id(p) for p in fresh.parameters()] == objects
    assert [id(p) for g in other.param_groups for p in g["params"]] == objects
    assert torch.equal(torch.get_rng_state(), random)


def plain_sgd(model: nn.Module) -> tuple[nn.Module, Optimizer]:
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another layer": (
        lambda m: plain_sgd(nn.Sequential(*m, nn.Linear(4, 4))),
        "only the model has the parameter '8.bias'",
    ),
    "a layer less": (lambda m: plain_sgd(m[:-1]), "only the checkpoint has the parameter '7.bias'"),
    "another shape": (
        lambda m: plain_sgd(nn.Sequential(*m[:-1], nn.Linear(24, 5))),
        r"'7.weight' is float32 \(5, 24\) in the model and float32 \(4, 24\) in the checkpoint",
    ),
    "another dtype": (lambda m: plain_sgd(m.double()), "is float64 .* and float32"),
    "a group more": (
        lambda m: (
            m,
            torch.optim.SGD([{"params": [p]} for p in m.parameters()], lr=0.1, momentum=0.9),
        ),
        "has 8 parameter groups, the checkpoint's had 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_state_of_another_model_or_optimizer_is_refused(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    refused(change, message, tmp_path)


def test_a_model_that_was_loaded_takes_states_of_other_forms(tmp_path: Path) -> None:
    model = dr.factorize(net(0), 3)
    dr.save(tmp_path / "run", model=model)
    low, full = copy.deepcopy(model.state_dict()), dr.inflate(model).state_dict()
    fresh = net(1)
    dr.load(tmp_path / "run", model=fresh)
    fresh.load_state_dict(full)
    assert_same_bits(fresh.state_dict(), full)
    fresh.load_state_dict(low)
    assert_same_bits(fresh.state_dict(), low)


def test_compiled_models_are_saved_and_loaded_as_what_they_compile(tmp_path: Path) -> None:
    model, fresh = dr.factorize(net(0), 3), net(1)
    compiled = [torch.compile(one, backend="eager") for one in (model, fresh)]
    dr.save(tmp_path / "run", model=compiled[0], optimizer=plain_sgd(model)[1])  # type: ignore[arg-type]
    for into in (net(2), compiled[1]):
        optimizer = torch.optim.SGD(into.parameters(), lr=0.5, momentum=0.9)  # type: ignore[attr-defined]
        dr.load(tmp_path / "run", model=into, optimizer=optimizer)  # type: ignore[arg-type]
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert_same_bits(fresh.state_dict(), model.state_dict())


class Refuses:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: object) -> None:
        raise ValueError("this one refuses")


def other_buffers(one: Any) -> None:
    one.register_buffer("mine", torch.zeros(2))


def another_lr_scheduler(run: Any) -> None:
    run.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 5)


FAILS: dict[str, tuple[Callable[[Any], object], str]] = {
    "an object of the user's": (lambda run: setattr(run, "scaler", Refuses()), "this one refuses"),
    "another LR scheduler": (another_lr_scheduler, "another class: its state has 'gamma'"),
    "other buffers": (lambda run: other_buffers(run.model), 'Missing key.* "mine"'),
    "an average with other buffers": (lambda run: other_buffers(run.ema), 'Missing key.* "mine"'),
    "an average of other layers": (
        lambda run: setattr(run, "ema", nn.Sequential(nn.Linear(3, 3))),
        "the model has no layer '5'",
    ),
    "another dictionary": (lambda run: setattr(run, "ema", {"mine": 1}), "has other keys than in"),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_load_that_fails_late_changes_nothing_at_all(name: str, tmp_path: Path) -> None:
    saved, own = Running("low-rank", "adamw"), Running("low-rank", "adamw", seed=1)
    saved.steps(0, 6)
    own.steps(0, 2)
    for run in (saved, own):
        run.ema, run.scaler = copy.deepcopy(run.model), torch.amp.GradScaler("cpu")
    dr.save(tmp_path / "run", **saved.parts())
    change, message = FAILS[name]
    change(own)
    parts = own.parts()
    states = [one for one in parts.values() if not isinstance(one, dict)]

    def now() -> list[Any]:
        found = [one.state_dict() for one in states] + [torch.get_rng_state()]
        return copy.deepcopy([*found, *(g["params"] for g in own.optimizer.param_groups)])

    before, members = now(), [*map(id, own.optimizer.param_groups[0]["params"])]
    with pytest.raises(ValueError, match=message):
        dr.load(tmp_path / "run", **parts)
    assert_same_bits(now(), before)
    assert [*map(id, own.optimizer.param_groups[0]["params"])] == members
    own.ema = {"loss": torch.zeros(())}
    own.step(2)


def test_the_state_of_an_optimizer_of_another_class_is_refused(tmp_path: Path) -> None:
    model = net(0)
    dr.save(tmp_path / "run", model=model, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"of the class SGD, .* was of the class Adam"):
        dr.load(tmp_path / "run", model=model, optimizer=plain_sgd(model)[1])


def test_an_optimizer_of_fewer_parameters_is_refused(tmp_path: Path) -> None:
    model = net(0)
    dr.save(tmp_path / "run", model=model, optimizer=plain_sgd(model)[1])
    some = torch.optim.SGD([*model.parameters()][:-1], lr=0.1)
    with pytest.raises(ValueError, match=r"only the checkpoint's optimizer holds .* '7.bias'"):
        dr.load(tmp_path / "run", model=model, optimizer=some)


def test_what_was_not_saved_cannot_be_loaded(tmp_path: Path) -> None:
    run = Running("adapted", "sgd")
    dr.save(tmp_path / "run", model=run.model)
    with pytest.raises(ValueError, match="ranks=: 1 given, the checkpoint holds the state of 0"):
        dr.load(tmp_path / "run", model=run.model, ranks=run.ranks)


def test_the_copy_is_of_the_step_at_which_it_was_taken(tmp_path: Path) -> None:
    run = Running("low-rank", "adamw")
    run.steps(0, 5)
    state, contents = run.state(), take(**run.parts())
    run.steps(5)
    restore(contents, **run.parts())
    assert_same_bits(run.state(), state)


def test_a_saved_model_is_readable_as_a_plain_file(tmp_path: Path) -> None:
    model = net(0)
    dr.save(tmp_path / "model", model=model)
    found = load_file(tmp_path / "model" / "model.safetensors")
    own: dict[str, Tensor] = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in own.items())


def test_a_state_of_a_plain_model_is_restored_into_what_became_of_it() -> None:
    model = net(0)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    contents = take(model=model, optimizer=optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dr.factorize(model, 3, layers="5", optimizer=optimizer)
    dr.deflate(model, 2, layers="0", optimizer=optimizer)
    restore(contents, model=model, optimizer=optimizer)
    dr.check(model, optimizer)
    assert_same_bits([before], [dict(model.state_dict())])


def test_a_checkpoint_of_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path / "\x1b[31m", Contents({"model": {"weight": torch.ones(2)}}))
    with pytest.raises(ValueError, match="does not fit what it is loaded into") as caught:
        dr.load(tmp_path / "\x1b[31m", model=nn.Linear(2, 2))
    assert str(caught.value).isprintable()
