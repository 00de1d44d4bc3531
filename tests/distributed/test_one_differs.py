"""One process of two fails or differs: the other hears of it at once, and nothing changes there."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from only_new_objects import frozen_objects_too
from process_pool import Pools
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dynarank as dr
from dynarank.distributed.processes import DisagreementError, PeerError, processes_of

LAYERS = ["0", "2"]


class Run:
    """A model in DDP that trains for some steps."""

    def __init__(self, schedule: Any = None, *, inflate: int = 1, **options: Any) -> None:
        torch.manual_seed(0)
        parts = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.model = nn.Sequential(*parts)
        self.wrapper: Any = DDP(self.model, find_unused_parameters=True)
        self.optimizer = options.pop("optimizer", torch.optim.AdamW)(self.model.parameters())
        schedule = schedule or dr.schedules.dynamic_rank(rank=2, inflate=inflate, to="low-rank")
        steps = options.pop("total_steps", 8)
        self.ranks = dr.RankScheduler(
            self.wrapper, self.optimizer, schedule, steps, layers=LAYERS, **options
        )

    def train(self, steps: int = 1) -> Run:
        torch.manual_seed(dist.get_rank())
        for _ in range(steps):
            self.wrapper(torch.randn(4, 8)).square().mean().backward()
            self.optimizer.step()
            self.ranks.step()
            self.optimizer.zero_grad()
        return self

    @property
    def forms(self) -> list[str]:
        return [type(form).__name__ for form in dr.current_plan(self.model).values()][:2]

    @property
    def spread(self) -> float:
        """The largest difference of a parameter between the processes."""
        values = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        other = values.clone()
        dist.broadcast(other, 0)
        apart = (values - other).abs().max()
        dist.all_reduce(apart, op=dist.ReduceOp.MAX)
        return float(apart)


def second() -> bool:
    return dist.get_rank() == 1


def fail(*_: object) -> Any:
    if second():
        raise OSError("no disk")


def batches() -> list[Any]:
    fail()
    return [torch.randn(4, 8)]


class Before(dr.scheduler.callbacks.Callback):
    def before_change(self, ranks: Any, wanted: Any) -> None:
        _ = ranks.last_step and fail()


class After(dr.scheduler.callbacks.Callback):
    def after_change(self, ranks: Any, changes: Any) -> None:
        _ = ranks.last_step and fail()


class FailsOnce:
    """A schedule that fails in the first step, after the constructor has looked at all."""

    armed = False

    def __call__(self, clock: Any, readings: Any) -> Any:
        _ = FailsOnce.armed and fail()
        return {path: dr.LowRank(2) for path in readings.layers}


def of_schedule() -> Run:
    FailsOnce.armed = False
    run = Run(FailsOnce())
    FailsOnce.armed = True
    return run


def of_batches(kind: Any) -> Callable[[], Run]:
    def made() -> Run:
        given = [lambda: [torch.randn(4, 8)]]
        schedule = dr.schedules.dynamic_rank(rank=2, inflate=1, deflate=2, to="low-rank")
        run = Run(schedule, callbacks=[kind(lambda: given[0]())]).train()
        given[0] = batches
        return run

    return made


def of_given_batches() -> Run:
    schedule = dr.schedules.dynamic_rank(rank=2, inflate=1, deflate=2, to="low-rank")
    run = Run(schedule, batches=lambda: [torch.randn(4, 8)]).train()
    run.ranks._budgets._given = batches  # pyright: ignore[reportPrivateUsage]
    return run


def after_step_of_second(run: Run, call: Callable[[], object]) -> Run:
    def hook(*_: object) -> None:
        call()

    if second():
        run.optimizer.register_step_post_hook(hook)
    return run


def of_states() -> Run:
    run = Run()
    return after_step_of_second(run, run.optimizer.state.clear)


def of_values() -> Run:
    run = Run()
    return after_step_of_second(run, lambda: next(run.model.parameters()).data.fill_(torch.nan))


# A run that is made, and what both processes say when it trains for a step.
DIFFERENT: dict[str, tuple[Callable[[], Run], str, str]] = {
    "schedule": (of_schedule, "plan of step 1 failed in process 1: OSError: no disk", "no disk"),
    "before": (lambda: Run(callbacks=[Before()]), "failed in process 1: OSError: no d", "no disk"),
    "activations": (of_batches(dr.ActivationAwareTruncation), "1: OSError: no disk", "no disk"),
    "BatchNorm": (of_batches(dr.BatchNormRecalibration), "1: OSError: no disk", "no disk"),
    "batches": (of_given_batches, "1: OSError: no disk", "no disk"),
    "after": (lambda: Run(callbacks=[After()]), "a change failed in process 1: OSE", "no disk"),
    "states": (of_states, "differ in the optimizer's states", "differ in the optimizer's states"),
    "NaN": (of_values, "not finite in process 1", "not finite in process 1"),
}
CHANGED = ("BatchNorm", "after")  # called after the change, which stands


def differs(name: str) -> tuple[str, bool, float]:
    run = DIFFERENT[name][0]()
    before = run.forms
    try:
        run.train()
    except (OSError, PeerError, DisagreementError) as error:
        return str(error), run.forms == before, 0.0 if name == "NaN" else run.spread
    return "no error", False, 0.0


@pytest.mark.parametrize("name", DIFFERENT)
def test_all_hear_of_what_one_does(processes: Pools, name: str) -> None:
    (said, same, spread), (other, same_there, _) = processes(2)(differs, name)
    assert DIFFERENT[name][1] in said and DIFFERENT[name][2] in other
    assert (same == same_there == (name not in CHANGED) and spread == 0.0) or name == "states"


def refused(name: str) -> tuple[str, list[str]]:
    run = Run()
    state = run.ranks.state_dict()
    options: dict[str, Any] = {}
    if name == "optimizer":
        options["optimizer"] = torch.optim.SGD if second() else torch.optim.AdamW
    elif name == "total_steps":
        options["total_steps"] = 0 if second() else 8
    elif second():
        del state["forms"]
    try:
        run.ranks.load_state_dict(state) if name == "state" else Run(**options)
    except (ValueError, PeerError) as error:
        return str(error), run.forms
    return "no error", []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("optimizer", "differ in the rank scheduler['optimizers'][0]"),
        ("total_steps", "a RankScheduler failed in process 1: ValueError: total_steps"),
        ("state", "loading a rank scheduler failed in process 1: ValueError"),
    ],
)
def test_what_one_is_refused_all_are(processes: Pools, name: str, text: str) -> None:
    said, other = processes(2)(refused, name)
    assert text in said[0] and "no error" not in other[0]
    assert said[1] == other[1] == ["LowRank", "LowRank"]


def fails_outside() -> str:
    """One fails in what is around the exchange that the other has come to."""
    together = processes_of(nn.Linear(2, 2))

    def outer() -> None:
        fail()
        together.attempt("inside", lambda: None)

    try:
        together.attempt("outside", outer)
    except (OSError, PeerError) as error:
        return str(error)
    return "no error"


def test_a_failure_is_heard_wherever_the_others_are(processes: Pools) -> None:
    found = processes(2)(fails_outside)
    assert found == ["outside failed in process 1: OSError: no disk", "no disk"]


def other_centered_weights() -> str:
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    torch.manual_seed(dist.get_rank())
    weight = torch.randn(16, 16)
    model[0].weight.data = weight - weight.mean()
    try:
        dr.factorize(model, 2, layers="0", optimizer=torch.optim.SGD(model.parameters(), 0.1))
    except DisagreementError as error:
        return str(error)
    return "no error"


def test_other_weights_are_found_though_their_sums_are_zero(processes: Pools) -> None:
    assert all(
        "other weights in process 1" in text for text in processes(2)(other_centered_weights)
    )


def own_copy_is_loaded() -> tuple[float, list[str]]:
    run = Run(inflate=2)
    apart = copy.deepcopy(run.model)
    run.train(2)
    if second():
        apart.load_state_dict(run.model.state_dict())  # it becomes full-rank
    return run.train(2).spread, run.forms


def test_one_process_may_load_a_copy_of_its_own(processes: Pools) -> None:
    assert processes(2)(own_copy_is_loaded) == [(0.0, ["FullRank", "FullRank"])] * 2


def frozen_objects() -> float:
    run = Run()
    gc.collect()
    gc.freeze()
    with frozen_objects_too():
        try:
            return run.train(3).spread
        finally:
            frozen = gc.get_freeze_count()
            gc.unfreeze()
            assert frozen


def test_wrappers_are_found_after_gc_freeze(processes: Pools) -> None:
    assert processes(2)(frozen_objects) == [0.0, 0.0]


def compiled() -> float:
    run = Run(inflate=2)
    run.wrapper = torch.compile(run.wrapper, backend="eager")
    return run.train(3).spread


def test_the_compiled_wrapper_goes_on(processes: Pools) -> None:
    assert processes(2)(compiled) == [0.0, 0.0]


def pickled() -> list[str]:
    run = Run().train(2)
    parts = run.model, run.optimizer, run.ranks
    model, _, ranks = pickle.loads(pickle.dumps(parts))
    assert ranks.model is model and ranks.processes.size == 2
    with suppress(AttributeError):
        copy.deepcopy(parts)[2].close()
    return [type(form).__name__ for form in dr.current_plan(model).values()][:2]


def test_a_rank_scheduler_is_pickled_in_a_process_group(processes: Pools) -> None:
    assert processes(2)(pickled) == [["FullRank", "FullRank"]] * 2
