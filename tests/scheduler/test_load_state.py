"""Loading a rank scheduler's state: all or nothing, and in any order."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import permutations
from typing import Any

import pytest
import torch
from small_run import FULL, LOW, SCHEDULE, STEPS, assert_same_bits, net, poison, train_step
from torch import nn

from dynarank import Adapted, LowRank, LRRewarmup, RankScheduler
from dynarank.forms import Plan
from dynarank.scheduler.callbacks import Callback
from dynarank.schedules import (
    Clock,
    ClosedLoop,
    Phases,
    Readings,
    cuttlefish,
    dynamic_rank,
    growing,
)

HOLDERS = ("ranks", "model", "optimizer")
FORECAST = dynamic_rank(2)


class Counting(Callback):
    """Counts the changes, and takes any number from a state."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {"changes": 0}

    def after_change(self, ranks: Any, changes: list[Any]) -> None:
        self.counts["changes"] += len(changes)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts.clear()  # half done when it raises
        if type(state["changes"]) is not int or len(state) > 1:
            raise ValueError("changes is a whole number")
        self.counts["changes"] = state["changes"]


def build(schedule: Any = SCHEDULE, optimizer: str = "adamw") -> dict[str, Any]:
    model: Any = net()
    made: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    if optimizer == "sgd":
        made = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rates = torch.optim.lr_scheduler.StepLR(made, 1, 0.9)
    callbacks: list[Any] = [LRRewarmup(3), Counting()]
    source = rates if schedule is FORECAST else None
    ranks = RankScheduler(model, made, schedule, STEPS, lr_scheduler=source, callbacks=callbacks)
    return {"ranks": ranks, "model": model, "optimizer": made, "rates": rates}


def train(run: dict[str, Any], start: int, stop: int) -> None:
    for step in range(start, stop):
        train_step(run["model"], run["optimizer"], step)
        run["ranks"].step()
        run["rates"].step()


def states(run: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(run[name].state_dict()) for name in (*HOLDERS, "rates")}


def everything(run: dict[str, Any]) -> tuple[object, ...]:
    """All that must be as it was, by identity and by value."""
    model, optimizer, ranks = run["model"], run["optimizer"], run["ranks"]
    values = {name: (id(p), p.tolist()) for name, p in model.named_parameters()}
    groups = [{**g, "params": [*map(id, g["params"])]} for g in optimizer.param_groups]
    moments = {
        id(p): (id(s), [(name, torch.as_tensor(v).tolist()) for name, v in s.items()])
        for p, s in optimizer.state.items()
    }
    layers = [(type(m), str(getattr(m, "last_factored_forms", None))) for m in model.modules()]
    return values, groups, moments, layers, copy.deepcopy(ranks.state_dict()), ranks.schedule


# All or nothing.


def leaves(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in plain data, inner ones too; of a list the first only."""
    if at:
        yield at
    entries = data.items() if isinstance(data, dict) else enumerate(data[:1])
    for key, value in entries:
        if isinstance(value, dict | list):
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key)


def corrupted(state: Any) -> Iterator[tuple[str, Any]]:
    """The state with one value missing, renamed or replaced."""
    for at in leaves(state):
        *way, key = at
        for change in ("drop", "rename", None, -1, math.nan, 2**70, 0.5, "x", [], {}, True):
            made = copy.deepcopy(state)
            holder = made
            for one in way:
                holder = holder[one]
            if change == "drop":
                del holder[key]
            elif change != "rename":
                holder[key] = change
            elif isinstance(holder, dict):
                holder[f"{key}-"] = holder.pop(key)
            yield f"{'.'.join(map(str, at))}: {change!r}", made


SCHEDULES: dict[str, Callable[[], Any]] = {
    "dynamic-rank": lambda: SCHEDULE,
    "forecast": lambda: FORECAST,
    "closed-loop": lambda: ClosedLoop(2, spectra_every=2, warmup=0, patience=1, fall=0.001),
    "cuttlefish": lambda: cuttlefish(spectra_every=1),
    "growing": lambda: growing(3, spectra_every=1),
}


# What is loaded although it was changed: numbers that could be, and what is only a record.
POSSIBLE = (
    "last_step: 1180591620717411303424", "schedule.", "retry_at: ", "patience: ", "rates",
    "every: ", "seen", "rises", "postponed.0.after", "postponed.2.after", "postponed: {}",
    "postponed.2: 'drop'", "recompute: True", "decisions", "changes", "plan: {}", "plan: None",
    "plan.", "last_factored_forms: {}", "'drop'", "'rename'", "batches: []",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_corrupted_state_changes_nothing_or_is_loaded_as_it_is(name: str) -> None:
    saved, run = build(SCHEDULES[name]()), build(SCHEDULES[name]())
    train(saved, 0, 5)
    poison(saved["model"], math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(saved, 5, 9)
    train(run, 0, 2)
    state = json.loads(json.dumps(saved["ranks"].state_dict()))
    before, refused = str(everything(run)), 0
    for what, wrong in corrupted(state):
        try:
            run["ranks"].load_state_dict(wrong)
        except ValueError:
            refused += 1
            assert str(everything(run)) == before, what
            continue
        assert repr(run["ranks"].state_dict()) == repr(wrong), what
        assert repr(wrong) == repr(state) or any(one in what for one in POSSIBLE), what
        before = str(everything(run))
    assert refused > 300


# States of other runs.


def other_run(**options: Any) -> dict[str, Any]:
    model = options.pop("model", None) or net()
    schedule = options.pop("schedule", SCHEDULE)
    made = torch.optim.AdamW(model.parameters())
    return RankScheduler(model, made, schedule, STEPS, **options).state_dict()


def a_function(clock: Clock, readings: Readings) -> Plan:
    return dict.fromkeys(readings.layers, LOW)


WIDE = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "0"}, "scheduled the layers"),
        ({"layers": "*"}, "scheduled the layers"),
        ({"model": WIDE.double()}, "scheduled the layers"),
        ({"schedule": dynamic_rank(2, inflate=4, deflate=9)}, "followed the schedule"),
        ({"schedule": dynamic_rank(2, inflate=4, deflate=8, to="low-rank")}, "followed the sched"),
        ({"schedule": Phases([0], [LOW])}, "followed the schedule"),
        ({"schedule": a_function, "layers": ["0", "2"]}, "followed the schedule 'a_function'"),
    ],
)
def test_a_state_of_another_run_is_refused(options: dict[str, Any], message: str) -> None:
    model = net()
    ranks = RankScheduler(model, torch.optim.AdamW(model.parameters()), SCHEDULE, STEPS)
    run = {"ranks": ranks, "model": model, "optimizer": ranks.optimizer[0]}
    before = str(everything(run))
    with pytest.raises(ValueError, match=message):
        ranks.load_state_dict(other_run(**options))
    assert str(everything(run)) == before


def test_the_same_function_is_the_same_schedule() -> None:
    model = net()
    made = torch.optim.AdamW(model.parameters())
    ranks = RankScheduler(model, made, a_function, STEPS, layers=["0", "2"])
    ranks.load_state_dict(other_run(schedule=a_function, layers=["0", "2"]))


class Refuses(Callback):
    """Raises when it is loaded, after it has changed itself."""

    loaded = 0

    def state_dict(self) -> dict[str, Any]:
        return {"loaded": self.loaded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loaded += 1
        raise self.error

    def __init__(self, error: BaseException) -> None:
        self.error = error


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), KeyboardInterrupt()])
def test_a_load_that_is_stopped_in_its_midst_changes_nothing(error: BaseException) -> None:
    def made() -> dict[str, Any]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters())
        callbacks: list[Any] = [Counting(), Refuses(error)]
        ranks = RankScheduler(model, optimizer, SCHEDULE, STEPS, callbacks=callbacks)
        rates = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {"ranks": ranks, "model": model, "optimizer": optimizer, "rates": rates}

    saved, run = made(), made()
    train(saved, 0, 9)
    train(run, 0, 2)
    poison(run["model"], math.nan)  # its zeros are taken back too
    before = str(everything(run))
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ValueError
    with pytest.raises(kind):
        run["ranks"].load_state_dict(saved["ranks"].state_dict())
    assert str(everything(run)) == before


@pytest.mark.parametrize("step", range(0, STEPS, 3))
def test_a_state_loaded_onto_itself_changes_nothing(step: int) -> None:
    run = build()
    train(run, 0, step)
    before = str(everything(run))
    run["ranks"].load_state_dict(run["ranks"].state_dict())
    assert str(everything(run)) == before


# In any order.

ORDERED: dict[str, Any] = {
    "adapted": SCHEDULE,
    "low-rank": dynamic_rank(2, inflate=4, deflate=8, to="low-rank"),
    "restarts": Phases([0, 3, 6], [Adapted(2), Adapted(2, restart=1), Adapted(2, alpha=4.0)]),
    "from-full": Phases([0, 2, 5, 8], [FULL, LOW, FULL, LowRank(1)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ORDERED)
def test_every_order_gives_the_run_uninterrupted(name: str, optimizer: str) -> None:
    whole, saved = build(ORDERED[name], optimizer), {}
    for step in range(STEPS):
        saved[step] = states(whole)
        train(whole, step, step + 1)
    for step in (1, 3, 5, 7, 10):
        for order in permutations(HOLDERS):
            run = build(ORDERED[name], optimizer)
            for holder in order:
                run[holder].load_state_dict(copy.deepcopy(saved[step][holder]))
            run["rates"].load_state_dict(saved[step]["rates"])
            assert_same_bits(states(run), saved[step])
            train(run, step, STEPS)
            assert_same_bits(states(run), states(whole))


def test_an_optimizer_loaded_first_keeps_its_moments_through_a_change_of_form() -> None:
    """Factors have the same shapes in an adapter as in a low-rank layer."""
    saved, run = build(), build()
    train(saved, 0, 10)
    for holder in ("optimizer", "ranks", "model"):
        run[holder].load_state_dict(saved[holder].state_dict())
    assert_same_bits(states(run)["optimizer"], states(saved)["optimizer"])


def test_an_unsigned_optimizer_state_of_other_forms_is_refused_and_changes_nothing() -> None:
    saved, run = build(), build()
    train(saved, 0, 6)
    before = str(everything(run))
    state = saved["optimizer"].state_dict()
    with pytest.raises(ValueError, match="oad the rank scheduler's state first"):
        run["optimizer"].load_state_dict({name: state[name] for name in ("state", "param_groups")})
    assert str(everything(run)) == before


def test_closing_gives_the_optimizers_loads_back() -> None:
    run = build()
    run["ranks"].close()
    assert not run["optimizer"]._optimizer_load_state_dict_pre_hooks
    assert not run["optimizer"]._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize("steps", [5, 10])
def test_a_model_takes_the_state_of_other_forms_and_a_layer_alone_refuses_it(steps: int) -> None:
    saved, run = build(), build()
    train(saved, 0, steps)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="oad the rank scheduler's state first"):
            run["model"][0].load_state_dict(saved["model"][0].state_dict(), strict=strict)
    run["model"].load_state_dict(saved["model"].state_dict())
    assert str(run["model"]) == str(saved["model"])
    part = {name: value for name, value in run["model"].state_dict().items() if "0." in name}
    run["model"].load_state_dict(part, strict=False)  # of some layers, as torch allows
