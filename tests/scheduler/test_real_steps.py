"""Which calls of ``ranks.step()`` count, and what the guard finds one step after a change."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import copy
import pickle
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from stepping import idle_step, one_step
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

import dynarank as dr
from dynarank import RankScheduler
from dynarank.forms import FullRank
from dynarank.scheduler.real_steps import PATIENCE
from dynarank.schedules import dynamic_rank

TOTAL = 8
SCHEDULE = dynamic_rank(2, inflate=3, deflate=6, to="low-rank")
CPU_SCALER: Any = torch.amp.GradScaler  # typed for CUDA only


def net(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=bias), nn.ReLU(), nn.Linear(8, 4, bias=bias))


def scheduler(model: nn.Module, optimizer: Any, **options: Any) -> RankScheduler:
    return RankScheduler(model, optimizer, SCHEDULE, TOTAL, layers="0", **options)


def backward(model: nn.Module, step: int = 0) -> Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    loss = model(x).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Any, ranks: RankScheduler, start: int, stop: int) -> None:
    for step in range(start, stop):
        backward(model, step)
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()


# Which calls count.


@pytest.mark.parametrize("often", [1, 2, 5])
def test_micro_batches_are_no_steps(often: int) -> None:
    """The same run, bit by bit, whether ``step()`` is called once a batch or once a step."""

    def run(every_batch: bool) -> list[list[float]]:
        model = net()
        optimizer = AdamW(model.parameters())
        ranks = scheduler(model, optimizer)
        for batch in range(TOTAL * often):
            backward(model, batch)
            if (batch + 1) % often == 0:
                optimizer.step()
                optimizer.zero_grad()
            if every_batch or (batch + 1) % often == 0:
                ranks.step()
        assert ranks.last_step == TOTAL
        return [p.flatten().tolist() for p in model.parameters()]

    assert run(True) == run(False)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_a_step_that_the_gradient_scaler_skips_is_not_counted(options: dict[str, Any]) -> None:
    model = net()
    optimizer, scaler = AdamW(model.parameters(), **options), CPU_SCALER("cpu", init_scale=8.0)
    ranks = scheduler(model, optimizer)
    counted: list[int] = []
    for step in range(5):
        loss = model(torch.full((2, 8), torch.inf if step in (0, 3) else 1.0)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ranks.step()
        counted.append(ranks.last_step)
    assert counted == [0, 1, 2, 2, 3]
    assert isinstance(dr.current_plan(model)["0"], FullRank)


def test_of_several_optimizers_one_step_counts_however_many_have_stepped() -> None:
    model = net()
    both = [SGD(model[0].parameters(), 0.1), SGD(model[2].parameters(), 0.1)]
    ranks = scheduler(model, both)
    for stepped, count in (([0], 1), ([1, 1, 0], 2), ([], 2), ([1], 3)):
        backward(model)
        for i in stepped:
            both[i].step()
        ranks.step()
        assert ranks.last_step == count


def test_a_closure_is_one_step_however_often_it_is_called() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    ranks = RankScheduler(
        model, optimizer, dynamic_rank(2, inflate=9, deflate=10), 12, layers="0", moments="reset"
    )
    for _ in range(3):
        optimizer.step(lambda: (optimizer.zero_grad(), backward(model))[1].item())
        ranks.step()
    assert ranks.last_step == 3


class Lookahead:
    """An optimizer of nobody's class, around another."""

    def __init__(self, optimizer: SGD) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self) -> None:
        self.optimizer.step()


class Sharpness(torch.optim.Optimizer):
    """A wrapper whose first step moves parameters and is no step of the run."""

    def __init__(self, optimizer: SGD) -> None:
        super().__init__([{"params": group["params"]} for group in optimizer.param_groups], {})
        self.base_optimizer, self.param_groups = optimizer, optimizer.param_groups

    def first_step(self) -> None: ...
    def step(self, closure: Any = None) -> Any:
        self.base_optimizer.step()


@pytest.mark.parametrize("wrapper", [Lookahead, Sharpness])
def test_the_steps_of_the_optimizer_inside_count(wrapper: Any) -> None:
    model = net()
    optimizer = wrapper(SGD(model.parameters(), 0.1))
    ranks = scheduler(model, optimizer)
    for step in range(4):
        backward(model)
        ranks.step()
        assert ranks.last_step == step
        optimizer.step()
        ranks.step()
        assert ranks.last_step == step + 1


class Unseen:
    """An optimizer without torch's step hooks."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": 0.1}]
        self.state: dict[Any, Any] = {}


class Unmade(Unseen, torch.optim.Optimizer):
    """One of torch's that skips the constructor which makes the hooks."""


@pytest.mark.parametrize("kind", [Unseen, Unmade])
def test_without_step_hooks_each_call_counts(kind: Any) -> None:
    model = net()
    ranks = scheduler(model, kind(model.parameters()), moments="reset")
    for step in range(1, 4):
        ranks.step()
        assert ranks.last_step == step


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_counts(backend: str) -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    ranks = scheduler(model, optimizer)
    step = torch.compile(optimizer.step, backend=backend)
    for count in range(1, 6):
        backward(model)
        step()
        ranks.step()
        assert ranks.last_step == count


def test_a_warm_up_from_rate_zero_counts_and_the_step_that_makes_states_does_not() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = net()
    optimizer = AdamW(model.parameters())
    ranks = scheduler(model, optimizer)
    get_optimizer_state_dict(model, optimizer)  # makes the states, by a step of rate 0
    ranks.step()
    assert optimizer.state and ranks.last_step == 0
    model = net()
    optimizer = AdamW(model.parameters())
    ranks, rates = scheduler(model, optimizer), LambdaLR(optimizer, lambda step: step / 4)
    assert rates.get_last_lr() == [0.0]
    train(model, optimizer, ranks, 0, 1)
    assert ranks.last_step == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_idle_step_within_a_run_counts_and_making_states_never_does(momentum: float) -> None:
    """At rate 0 with gradients of zero, where plain SGD has no state to tell it by."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = net()
    optimizer = SGD(model.parameters(), 0.1, momentum)
    ranks = scheduler(model, optimizer)
    for step in range(TOTAL):
        get_optimizer_state_dict(model, optimizer)  # without states, each takes such a step
        ranks.step()
        assert ranks.last_step == step
        optimizer.param_groups[0]["lr"] = 0.1 * (step != 4)
        (backward(model, step) if step != 4 else (model(torch.ones(2, 8)) * 0).sum().backward())
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
    assert ranks.last_step == TOTAL


# States and copies.


@pytest.mark.parametrize("call_first", [True, False])
def test_a_state_saved_between_the_two_steps_loses_none_and_doubles_none(call_first: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    ranks = scheduler(model, optimizer)
    train(model, optimizer, ranks, 0, 2)
    backward(model, 2)
    optimizer.step()
    saved = copy.deepcopy(ranks.state_dict())
    assert (saved["last_step"], saved["uncounted"]) == (2, 1)
    again = net()
    other = SGD(again.parameters(), 0.1)
    resumed = scheduler(again, other, state=saved)
    if call_first:  # the loop goes on where it was
        resumed.step()
        assert resumed.last_step == 3
    resumed.step()
    backward(again, 3)
    other.step()
    resumed.step()
    assert resumed.last_step == 4 and resumed.state_dict()["uncounted"] == 0
    resumed.load_state_dict(saved)
    resumed.load_state_dict(saved)
    assert (resumed.last_step, resumed.state_dict()["uncounted"]) == (2, 1)


@pytest.mark.parametrize("wrong", [-1, 1.0, True, None, TOTAL + 1])
def test_an_impossible_count_in_a_state_is_refused(wrong: Any) -> None:
    model = net()
    ranks = scheduler(model, SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="'uncounted' cannot be loaded"):
        ranks.load_state_dict({**ranks.state_dict(), "uncounted": wrong})
    assert ranks.state_dict()["uncounted"] == 0


def pickled(parts: Any) -> Any:
    return pickle.loads(pickle.dumps(parts))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_count_their_own_steps(copied: Callable[[Any], Any]) -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    ranks = scheduler(model, optimizer)
    train(model, optimizer, ranks, 0, 2)
    other_model, other, twin = copied((model, optimizer, ranks))
    optimizer.step()
    twin.step()
    assert twin.last_step == 2
    train(other_model, other, twin, 2, 4)
    assert (twin.last_step, ranks.last_step) == (4, 2)
    ranks.step()
    assert ranks.last_step == 3


def test_closing_removes_the_hooks_and_then_each_call_counts() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    ranks = scheduler(model, optimizer)
    assert optimizer._optimizer_step_post_hooks
    ranks.close()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    ranks.step()
    assert ranks.last_step == 1


def test_a_scheduler_that_is_refused_leaves_no_hooks() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="nothing"):
        RankScheduler(model, optimizer, SCHEDULE, TOTAL, layers="nothing")
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


# The wrong optimizer.


def test_another_optimizer_that_takes_the_steps_is_told_at_once() -> None:
    model = net()
    ranks = scheduler(model, SGD(model.parameters(), 0.1))
    other = AdamW(model.parameters())
    ranks.step()
    other.step()
    with pytest.warns(RuntimeWarning, match=r"without a step of SGD.*AdamW, which has its param"):
        ranks.step()
    other.step()
    ranks.step()  # said once
    assert ranks.last_step == 0


def test_very_many_calls_without_a_step_are_told_once() -> None:
    model = net()
    ranks = scheduler(model, SGD(model.parameters(), 0.1))
    for _ in range(PATIENCE - 1):
        ranks.step()
    with pytest.warns(RuntimeWarning, match=f"{PATIENCE} times in a row without a step of SGD"):
        ranks.step()
    ranks.step()


def test_an_optimizer_of_other_parameters_may_step_more_often() -> None:
    model, embedding = net(), nn.Linear(2, 2)
    optimizer, other = SGD(model.parameters(), 0.1), SGD(embedding.parameters(), 0.1)
    ranks = scheduler(model, optimizer)
    for step in range(6):
        other.step()
        if step % 3 == 2:
            optimizer.step()
        ranks.step()
    assert ranks.last_step == 2


# The guard.

HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "list": lambda model: list(model.parameters()),
    "tuple": lambda model: tuple(model.parameters()),
    "set": lambda model: set(model.parameters()),
    "deque": lambda model: deque(model.parameters()),
    "dict": lambda model: dict(model.named_parameters()),
    "dict of keys": lambda model: dict.fromkeys(model.parameters(), 0.0),
    "nested": lambda model: {"clip": [list(model.parameters())]},
}


@pytest.mark.parametrize("kind", HOLDERS)
@pytest.mark.parametrize("to", ["adapted", "low-rank"])
def test_a_container_that_holds_old_parameters_is_found_one_step_later(kind: str, to: Any) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    schedule = dynamic_rank(2, inflate=3, deflate=6, to=to)
    ranks = RankScheduler(model, optimizer, schedule, TOTAL, layers="0")
    for change in (3, 6):
        held = HOLDERS[kind](model)
        train(model, optimizer, ranks, ranks.last_step, change)
        assert ranks.last_step == change
        with pytest.raises(RuntimeError, match="still holds parameters of '0' that a change"):
            train(model, optimizer, ranks, change, change + 1)
        assert ranks.last_step == change  # not counted, and not lost
        del held
        ranks.step()
        assert ranks.last_step == change + 1
        optimizer.zero_grad()


def test_another_optimizer_that_holds_old_parameters_is_found() -> None:
    model = net()
    unused = AdamW(model.parameters())
    optimizer = SGD(model.parameters(), 0.1)
    ranks = scheduler(model, optimizer)
    with pytest.raises(RuntimeError, match="a group of another optimizer"):
        train(model, optimizer, ranks, 0, 2)
    del unused
    train(model, optimizer, ranks, 2, TOTAL)


def test_the_state_of_an_optimizer_of_an_earlier_run_is_named() -> None:
    model = net()
    earlier = AdamW(model.parameters())
    model(torch.randn(2, 8)).sum().backward()
    earlier.step()
    optimizer = SGD(model.parameters(), 0.1)
    ranks = scheduler(model, optimizer)
    words = r"^(a group|the state) of another optimizer \(AdamW\).*an earlier run, delete it"
    with pytest.raises(RuntimeError, match=words):
        train(model, optimizer, ranks, 0, 2)
    assert ranks.last_step == 0
    del earlier  # as the error says; the step is not lost
    ranks.step()
    assert ranks.last_step == 1


@pytest.mark.parametrize("unlifted", [False, True])
def test_an_exported_program_that_would_mix_old_and_new_parameters_is_named(unlifted: bool) -> None:
    model, x = net(), torch.ones(2, 8)
    optimizer = AdamW(model.parameters())
    ranks = scheduler(model, optimizer)
    train(model, optimizer, ranks, 0, 2)
    want = model(x).detach()
    kept = torch.export.export(copy.deepcopy(model), (x,)).module()  # as the error says
    program: Any = torch.export.export(model, (x,))
    program = program.module() if unlifted else program
    words = r"^an exported program \(\w+\) still holds parameters of '0'.* copy.deepcopy\(model\)"
    with pytest.raises(RuntimeError, match=words):
        train(model, optimizer, ranks, 2, TOTAL)
    del program
    ranks.step()
    assert ranks.last_step == 4
    optimizer.zero_grad()
    train(model, optimizer, ranks, 4, TOTAL)
    assert torch.equal(kept(x), want) and not torch.equal(model(x), want)


def test_the_owner_of_a_container_is_named() -> None:
    model = net()
    trainer = nn.Module()
    trainer.clipped = list(model.parameters())  # type: ignore[assignment]
    optimizer = AdamW(model.parameters())
    ranks = scheduler(model, optimizer)
    with pytest.raises(RuntimeError, match=r"^a list of 4 \('clipped' of Module\) still holds"):
        train(model, optimizer, ranks, 0, 2)


def test_lists_that_groups_were_made_of_are_warned_of_only() -> None:
    model = net()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}])
    ranks = scheduler(model, optimizer)
    with pytest.warns(RuntimeWarning, match="a list of 2 still holds .* as a group"):
        train(model, optimizer, ranks, 0, 2)
    assert decay and ranks.last_step == 2


class Hidden(SGD):
    """It steps what it has seen when it was made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), 0.1)
        self.mine = frozenset(str(id(p)) for p in model.parameters())

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if str(id(p)) in self.mine and p.grad is not None:
                with torch.no_grad():
                    p -= 0.1 * p.grad


@pytest.mark.filterwarnings("ignore:.*step.*:UserWarning")
def test_an_optimizer_that_does_not_step_new_parameters_is_found() -> None:
    model = dr.factorize(net(), 2, layers="0")
    optimizer = Hidden(model)
    ranks = scheduler(model, optimizer, moments="reset")
    train(model, optimizer, ranks, 0, 3)
    with pytest.raises(RuntimeError, match=r"'Hidden' did not step '0\.weight'"):
        train(model, optimizer, ranks, 3, 4)
    assert ranks.last_step == 3


def test_groups_that_were_replaced_after_a_change_are_found() -> None:
    model = dr.factorize(net(), 2, layers="0")
    optimizer = SGD(model.parameters(), 0.1)
    ranks = scheduler(model, optimizer)
    train(model, optimizer, ranks, 0, 3)
    optimizer.param_groups[0]["params"] = list(model[2].parameters())
    with pytest.raises(RuntimeError, match=r"no optimizer holds '0\.weight'"):
        train(model, optimizer, ranks, 3, 4)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "rate 0": lambda ps: SGD(ps, 0.0),
    "sgd foreach": lambda ps: SGD(ps, 0.1, foreach=True),
    "fused": lambda ps: AdamW(ps, fused=True),
    "foreach": lambda ps: AdamW(ps, foreach=True),
    "one by one": lambda ps: AdamW(ps, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_guard_says_nothing_of_ordinary_runs(name: str, bias: bool) -> None:
    model = net(bias=bias)
    optimizer = OPTIMIZERS[name](model.parameters())
    ranks = scheduler(model, optimizer)
    average, state, graphs = copy.deepcopy(model), model.state_dict(), list[Tensor]()
    variable = model[2].weight
    for step in range(TOTAL):
        before = next(model[0].parameters())
        keep = lambda: before  # noqa: B023, E731
        graphs.append(backward(model, step))
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
        assert keep() is not None
    assert ranks.last_step == TOTAL and average and state and graphs and variable is not None


def test_two_optimizers_that_take_turns_leave_nothing_out() -> None:
    model = net()
    both = [SGD(model[0].parameters(), 0.1), SGD(model[2].parameters(), 0.1)]
    ranks = RankScheduler(model, both, dynamic_rank(2, inflate=3, deflate=6), TOTAL, layers="*")
    for step in range(TOTAL):
        backward(model, step)  # both have gradients
        both[step % 2].step()
        ranks.step()
    assert ranks.last_step == TOTAL


def test_the_guard_costs_no_collection_where_old_parameters_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gc

    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    ranks = scheduler(model, optimizer)
    monkeypatch.setattr(gc, "collect", lambda: pytest.fail("collected"))
    train(model, optimizer, ranks, 0, TOTAL)


# LR schedulers of trainers.


class Config:
    """As Lightning keeps an LR scheduler."""

    def __init__(self, scheduler: LRScheduler, interval: str, frequency: int = 1) -> None:
        self.scheduler, self.interval, self.frequency = scheduler, interval, frequency


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_lightnings_config_tells_the_interval(interval: str) -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    rates = LambdaLR(optimizer, lambda step: 0.5**step)
    ranks = scheduler(model, optimizer, lr_scheduler=Config(rates, interval))
    assert ranks.forecast.source is rates
    assert ranks.forecast.every == (1 if interval == "step" else None)
    dr.check(model, optimizer, lr_scheduler=Config(rates, interval))


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("often", [1, 3])
@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerates_lr_scheduler_is_forecast_as_it_steps(
    processes: int, split: bool, often: int
) -> None:
    """It steps once a process; what was told before the run is what comes."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=often,
        dataloader_config=DataLoaderConfiguration(split_batches=split),
    )
    total, faster = 30, 1 if split else processes
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    cycle = OneCycleLR(optimizer, 0.1, total_steps=total * faster)
    model, optimizer, rates = accelerator.prepare(model, optimizer, cycle)
    PartialState._shared_state["num_processes"] = processes
    ranks = RankScheduler(model, optimizer, dynamic_rank(2), total, layers="0", lr_scheduler=rates)
    told, came = [(phase.start, phase.plan["0"]) for phase in ranks.phases()], list[Any]()
    came.append((0, dr.current_plan(model)["0"]))
    foreseen, had = ranks.forecast.rates, list[float]()
    for batch in range(total * often):
        with accelerator.accumulate(model):
            if batch % often == 0:
                had.append(optimizer.param_groups[0]["lr"])
            accelerator.backward(model(torch.ones(2, 8)).square().mean())
            optimizer.step()
            rates.step()
            if ranks.step():
                came.append((ranks.last_step, dr.current_plan(model)["0"]))
            optimizer.zero_grad()
    assert ranks.last_step == total
    assert [start for start, _ in told] == [start for start, _ in came]
    assert had == pytest.approx([foreseen[-(-1000 * i // total)] for i in range(total)], rel=1e-6)


def test_an_lr_scheduler_of_the_optimizer_inside_a_wrapper_is_taken() -> None:
    model = net()
    inner = SGD(model.parameters(), 0.1)
    ranks = scheduler(model, Sharpness(inner), lr_scheduler=LambdaLR(inner, lambda step: 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that no step came before
        assert one_step(ranks) == []
        idle_step(ranks)
    with pytest.raises(ValueError, match="of another optimizer"):
        other = SGD(net().parameters(), 0.1)
        scheduler(net(), inner, lr_scheduler=LambdaLR(other, lambda step: 1.0))
