"""The full-rank window finds itself, whatever moves the learning rate."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import net, train_step
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as lrs

from dynarank import Adapted, FullRank, LowRank, RankScheduler
from dynarank.forms import form_name
from dynarank.schedules import Clock, Readings, dynamic_rank, timeline
from dynarank.schedules.lr_aligned import decisive_decay, full_rank_window

LOW, LAST = LowRank(2), Adapted(2)
LAYERS = {"a": (8, 8)}


def transitions(total: int, lr: Callable[[Optimizer], Any] | None, every: int = 1, **options: Any):
    """The share of the run at which a real run inflates and deflates."""
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = lr(optimizer) if lr else None
    given_scheduler = scheduler if options.pop("given", True) else None
    ranks = RankScheduler(
        model, optimizer, dynamic_rank(2), total, lr_scheduler=given_scheduler, **options
    )
    found: dict[str, float] = {}
    for step in range(1, total + 1):
        train_step(model, optimizer, step)
        for change in ranks.step():
            found.setdefault(form_name(change.after), step / total)
        if scheduler is not None and step % every == 0:
            plateau = isinstance(scheduler, lrs.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau else []))
    return found["full-rank"], found["adapted"]


def epochs(milestones: list[int]) -> Callable[[Optimizer], Any]:
    return lambda optimizer: lrs.MultiStepLR(optimizer, milestones, 0.1)


@pytest.mark.parametrize("given", [True, False], ids=["foreseen", "followed"])
@pytest.mark.parametrize("every", [1, 4], ids=["every-step", "every-epoch"])
@pytest.mark.parametrize(
    ("total", "decays", "published"),
    [(150, [100, 130], (55, 120)), (200, [150, 180], (80, 170))],
)
def test_it_lands_within_a_twentieth_of_the_published_transition_points(
    total: int, decays: list[int], published: tuple[int, int], every: int, given: bool
) -> None:
    found = transitions(total * every, epochs(decays), every, given=given)
    assert found == pytest.approx([m / total for m in published], abs=0.05)


SCHEDULERS: dict[str, tuple[Callable[[Optimizer], Any], float]] = {
    "step": (lambda o: lrs.StepLR(o, 30), 0.3),
    "cosine": (lambda o: lrs.CosineAnnealingLR(o, 100), 0.62),
    "onecycle": (lambda o: lrs.OneCycleLR(o, 0.01, total_steps=100), 0.73),
    "linear": (lambda o: lrs.LinearLR(o, 1, 0, 100), 0.685),
    "exponential": (lambda o: lrs.ExponentialLR(o, 0.9), 0.11),
    "lambda": (lambda o: lrs.LambdaLR(o, lambda step: 1.0 if step < 50 else 0.2), 0.5),
    "polynomial": (lambda o: lrs.PolynomialLR(o, 100), 0.69),
    "restarts": (lambda o: lrs.CosineAnnealingWarmRestarts(o, 50), 0.81),
    "chained": (lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 40)], optimizer=o), 0.4),
    "warm-up, stable, decay": (
        lambda o: lrs.SequentialLR(
            o,
            [lrs.LinearLR(o, 0.1, 1, 5), lrs.ConstantLR(o, 1, 75), lrs.LinearLR(o, 1, 0.01, 20)],
            [5, 80],
        ),
        0.94,
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_the_window_spans_the_decay_of_every_scheduler(name: str) -> None:
    lr, decay = SCHEDULERS[name]
    inflate, deflate = transitions(100, lr)
    assert inflate < decay < deflate
    assert (inflate, deflate) == pytest.approx(full_rank_window(decay), abs=0.02)


def test_a_plateau_is_followed_as_it_comes() -> None:
    """The metric never gets better: the rate falls a tenfold after every 31 steps."""
    inflate, deflate = transitions(100, lambda o: lrs.ReduceLROnPlateau(o, patience=30))
    assert inflate == pytest.approx(0.33, abs=0.02)  # with the decay, which is early
    assert deflate == pytest.approx(0.33 + 0.4 * 0.67, abs=0.02)


def test_without_any_decay_the_usual_transition_points_hold() -> None:
    assert transitions(100, None) == pytest.approx((0.36, 0.9), abs=0.011)


def test_a_forecast_touches_nothing_of_the_users() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    scheduler = lrs.CosineAnnealingLR(optimizer, 50)
    before = scheduler.state_dict().copy(), [dict(g) for g in optimizer.param_groups]
    ranks = RankScheduler(model, optimizer, dynamic_rank(2), 50, lr_scheduler=scheduler)
    state = [(id(p), p.tolist()) for p in model.parameters()]
    for step in (1, 2, 3):
        scheduler.last_epoch += 1  # as if it had been stepped
        ranks.forecast.watch(step)
        scheduler.last_epoch -= 1
        assert ranks.forecast.rates
    assert scheduler.state_dict() == before[0]
    for group, old in zip(optimizer.param_groups, before[1], strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in old.items() if k != "params"
        }
    assert [(id(p), p.tolist()) for p in model.parameters()] == state


def test_a_scheduler_that_cannot_be_copied_is_followed() -> None:
    class Stubborn(lrs.LRScheduler):
        def get_lr(self) -> list[Any]:
            return [group["lr"] for group in self.optimizer.param_groups]

        def __deepcopy__(self, memo: object) -> object:
            raise RuntimeError("not me")

    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with pytest.warns(RuntimeWarning, match="learning rates of Stubborn cannot be forecast"):
        RankScheduler(model, optimizer, dynamic_rank(2), 10, lr_scheduler=Stubborn(optimizer))


def test_a_rate_that_rises_again_takes_the_decay_back() -> None:
    """One dip at 20 of 100, the real decay at 60."""
    schedule = dynamic_rank(2)
    state, forms = schedule.start(), []
    for step in range(100):
        rate = 0.01 if 20 <= step < 25 or step >= 60 else 1.0
        plan, state, _ = schedule.update(state, Clock(step, 100), Readings(LAYERS, rate))
        forms.append(plan["a"])
    assert forms.index(FullRank()) == 20 and forms.index(LAST) == 76


def test_given_transition_points_stay_and_the_other_is_found() -> None:
    rates = (1.0,) * 60 + (0.1,) * 40
    for options, starts in [
        ({"inflate": 0.1}, [0, 10, 76]),
        ({"inflate": 5}, [0, 5, 76]),
        ({"deflate": 0.9}, [0, 32, 90]),
    ]:
        schedule = dynamic_rank(2, **options)  # type: ignore[arg-type]
        assert [
            p.start for p in timeline(schedule, Readings(LAYERS, forecast=rates), 100)
        ] == starts


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0, 1))
def test_any_forecast_gives_three_phases_in_order(rates: list[float], length: float) -> None:
    schedule = dynamic_rank(2, length=length)
    decay = decisive_decay(tuple(rates))
    assert decay is None or 0 < decay <= 1
    begin, end = full_rank_window(decay, length)
    assert 0 <= begin <= end <= 1 and end - begin == pytest.approx(length, abs=1e-6)
    order = [LOW, FullRank(), LAST]
    phases = timeline(schedule, Readings(LAYERS, forecast=tuple(rates)), 50)
    places = [order.index(p.plan["a"]) for p in phases]
    assert places == sorted(set(places))


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=20, max_size=60), st.integers(0, 19))
def test_the_state_survives_json_and_is_never_changed(rates: list[float], cut: int) -> None:
    schedule = dynamic_rank(2)
    state = schedule.start()
    for step, rate in enumerate(rates):
        clock, readings = Clock(step, len(rates)), Readings(LAYERS, rate)
        before = json.dumps(state)
        answer = schedule.update(state, clock, readings)
        assert answer == schedule.update(state, clock, readings) and json.dumps(state) == before
        state = json.loads(json.dumps(answer.state)) if step == cut else answer.state
        assert step != cut or state == answer.state


@pytest.mark.parametrize("every", [1, 5])
def test_a_run_resumed_anywhere_changes_at_the_same_steps(every: int) -> None:
    def build() -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = net()
        optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
        scheduler = lrs.MultiStepLR(optimizer, [12 if every == 5 else 60], 0.1)
        ranks = RankScheduler(model, optimizer, dynamic_rank(2), 90, lr_scheduler=scheduler)
        return model, optimizer, scheduler, ranks

    def run(parts: tuple[Any, ...], begin: int, stop: int) -> list[tuple[int, int]]:
        model, optimizer, scheduler, ranks = parts
        changed = []
        for step in range(begin, stop):
            train_step(model, optimizer, step)
            changed.append((step, len(ranks.step())))
            if (step + 1) % every == 0:
                scheduler.step()
        return [(step, count) for step, count in changed if count]

    whole = build()
    expected = run(whole, 0, 90)
    assert len(expected) == 2
    for cut in (1, 3, 7, 40, 77):
        first = build()
        found = run(first, 0, cut)
        state = json.loads(json.dumps(first[3].state_dict()))
        second = build()
        second[3].load_state_dict(state)
        for mine, theirs in zip(second[:3], first[:3], strict=True):
            mine.load_state_dict(theirs.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert found + run(second, cut, 90) == expected
        for a, b in zip(second[0].parameters(), whole[0].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1.5}, r"a share of the run, lies in \[0, 1\], got 1.5"),
        ({"inflate": -1}, "got -1"),
        ({"inflate": 0.5, "deflate": 0.4}, "one after another, got 0.5 then 0.4"),
    ],
)
def test_impossible_windows_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dynamic_rank(2, **options)


def test_impossible_rates_are_refused() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="learning rates are finite and at least 0, got -1"):
        RankScheduler(model, optimizer, dynamic_rank(2), 10, lr_scheduler=[-1.0])


@pytest.mark.parametrize("given_scheduler", ["cosine", 0.1, torch.ones(3)], ids=str)
def test_what_is_no_lr_scheduler_is_refused(given_scheduler: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"lr_scheduler is an LR scheduler, such as Cosine.*got"):
        RankScheduler(model, optimizer, dynamic_rank(2), 10, lr_scheduler=given_scheduler)
