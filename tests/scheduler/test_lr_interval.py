"""The phases that are told before the first step are those that come, for any LR scheduler."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from covering import over
from small_run import net, sgd, train_step
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs

from dynarank import LowRank, RankScheduler
from dynarank.forms import FullRank
from dynarank.schedules import Clock, RankSchedule, Readings, dynamic_rank
from dynarank.schedules.base import Answer, Schedule

Maker = Callable[[Optimizer, int], Any]


def sequential(optimizer: Optimizer, length: int) -> Any:
    warm = length // 10
    parts: list[Any] = [lrs.LinearLR(optimizer, 0.1, total_iters=warm),
             lrs.CosineAnnealingLR(optimizer, length - warm)]  # fmt: skip
    return lrs.SequentialLR(optimizer, parts, [warm])


def chained(optimizer: Optimizer, length: int) -> Any:
    warm = lrs.LinearLR(optimizer, 0.1, total_iters=3)
    return lrs.ChainedScheduler([warm, lrs.CosineAnnealingLR(optimizer, length)], optimizer)


def _linear_decay(step: int, *, num_training_steps: int) -> float:
    return max(0.0, 1 - step / num_training_steps)


TELLING: dict[str, Maker] = {
    "cosine": lambda o, n: lrs.CosineAnnealingLR(o, n),
    "one-cycle": lambda o, n: lrs.OneCycleLR(o, 0.1, total_steps=n),
    "polynomial": lambda o, n: lrs.PolynomialLR(o, n, 2.0),
    "linear": lambda o, n: lrs.LinearLR(o, 1.0, 0.01, n),
    "sequential": sequential,
    "chained": chained,
    "transformers": lambda o, n: lrs.LambdaLR(
        o, functools.partial(_linear_decay, num_training_steps=n)
    ),
}
SILENT: dict[str, Maker] = {
    "multi-step": lambda o, n: lrs.MultiStepLR(o, [n // 2, 3 * n // 4], 0.1),
    "lambda": lambda o, n: lrs.LambdaLR(o, lambda step: 0.5 * (1 + math.cos(math.pi * step / n))),
    "step": lambda o, n: lrs.StepLR(o, max(1, n // 3), 0.1),
    "exponential": lambda o, n: lrs.ExponentialLR(o, 0.01 ** (1 / n)),
}
EVERY = TELLING | SILENT


def run(
    make: Maker, epochs: int, steps: int, every: int, schedule: Schedule, *, late: bool, **how: Any
) -> tuple[list[int], list[int]]:
    """The starts of phases as told before the first step, and as they come."""
    model, total = net(), epochs * steps
    optimizer = sgd(model)
    scheduler = make(optimizer, total // every)
    ranks = RankScheduler(model, optimizer, schedule, total, lr_scheduler=scheduler, **how)
    told, came = [phase.start for phase in ranks.phases()], [0]
    for step in range(1, total + 1):
        train_step(model, optimizer, step)
        if not late and step % every == 0:
            scheduler.step()
        if ranks.step():
            came.append(step)
        if late and step % every == 0:
            scheduler.step()
    return told, came


@over(
    {"name": EVERY, "every": [1, 31], "late": [True, False]}
)  # stepped after the ranks, or before
@pytest.mark.filterwarnings("error")
def test_the_phases_told_are_those_that_come(name: str, every: int, late: bool) -> None:
    told, came = run(EVERY[name], 10, 31, every, dynamic_rank(2), late=late, lr_every=every)
    assert told == came
    assert len(told) == 3


@pytest.mark.parametrize("every", [1, 31], ids=["step", "epoch"])
@pytest.mark.parametrize("name", TELLING)
@pytest.mark.filterwarnings("error")
def test_a_scheduler_as_long_as_the_run_tells_by_itself(name: str, every: int) -> None:
    told, came = run(TELLING[name], 10, 31, every, dynamic_rank(2), late=True)
    assert told == came


def test_a_cosine_stepped_each_batch_is_told_as_it_comes() -> None:
    told, _ = run(TELLING["cosine"], 10, 31, 1, dynamic_rank(2), late=True)
    assert told == [0, 104, 240]


@pytest.mark.parametrize("name", SILENT)
def test_what_is_unknown_is_said_once(name: str) -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = SILENT[name](optimizer, 10)
    ranks = RankScheduler(model, optimizer, dynamic_rank(2), 310, lr_scheduler=scheduler)
    with pytest.warns(UserWarning, match="give lr_every=1 .* lr_every=len") as caught:
        ranks.phases()
        ranks.phases()
    assert len(caught) == 1


def test_a_plateau_is_never_known() -> None:
    model = net()
    optimizer = sgd(model)
    plateau = lrs.ReduceLROnPlateau(optimizer)
    ranks = RankScheduler(model, optimizer, dynamic_rank(2), 10, lr_scheduler=plateau)
    with pytest.warns(UserWarning, match="ReduceLROnPlateau lowers the learning rate by what"):
        ranks.phases()


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_the_learning_rate_does_not_matter() -> None:
    run(SILENT["lambda"], 4, 10, 10, dynamic_rank(2, inflate=0.3, deflate=0.7), late=True)


def test_a_wrong_interval_is_said_and_corrected() -> None:
    with pytest.warns(RuntimeWarning, match="every 1 optimizer steps, not every 31"):
        told, came = run(SILENT["lambda"], 10, 31, 1, dynamic_rank(2), late=True, lr_every=31)
    right, _ = run(SILENT["lambda"], 10, 31, 1, dynamic_rank(2), late=True, lr_every=1)
    assert came == right != told
    with pytest.warns(RuntimeWarning, match="every 31 optimizer steps, not every 1 "):
        _, came = run(SILENT["lambda"], 10, 31, 31, dynamic_rank(2), late=True, lr_every=1)


def test_a_wrong_guess_is_said_if_phases_were_told_by_it_and_corrected() -> None:
    """Half a period of a cosine, and a whole one, look alike until it is stepped."""

    def half(optimizer: Optimizer, length: int) -> Any:
        return lrs.CosineAnnealingLR(optimizer, length // 2)

    with pytest.warns(RuntimeWarning, match="not stepped every 2 steps, as its length tells"):
        _, came = run(half, 10, 30, 1, dynamic_rank(2), late=True)
    right, _ = run(half, 10, 30, 1, dynamic_rank(2), late=True, lr_every=1)
    assert came == right


def test_a_wrong_guess_is_corrected_without_a_word_if_nobody_asked() -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = lrs.CosineAnnealingLR(optimizer, 15)
    ranks = RankScheduler(model, optimizer, dynamic_rank(2), 30, lr_scheduler=scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 31):
            train_step(model, optimizer, step)
            ranks.step()
            scheduler.step()
    assert ranks.forecast.every == 1


def follower(clock: Clock, readings: Readings) -> dict[str, Any]:
    """A stateless schedule that reads the learning rate of the step."""
    low = readings.learning_rate is not None and readings.learning_rate < 0.05
    return dict.fromkeys(readings.layers, FullRank() if low else LowRank(2))


class Following(RankSchedule):
    """The same with a state."""

    def update(self, state: Any, clock: Clock, readings: Readings, /) -> Answer:
        return Answer(follower(clock, readings), state)


@pytest.mark.parametrize("schedule", [follower, Following()], ids=["stateless", "stateful"])
@pytest.mark.parametrize("every", [1, 31], ids=["step", "epoch"])
def test_a_schedule_that_reads_each_rate_is_told_each(schedule: Schedule, every: int) -> None:
    def make(optimizer: Optimizer, length: int) -> Any:
        optimizer.param_groups[0].update(lr=0.1, initial_lr=0.1)
        return lrs.LambdaLR(optimizer, lambda n: 1 - n / length)

    model, total = net(), 310
    optimizer = sgd(model)
    scheduler = make(optimizer, total // every)
    ranks = RankScheduler(model, optimizer, schedule, total, lr_scheduler=scheduler, lr_every=every)
    told, came = [phase.start for phase in ranks.phases()], [0]
    for step in range(1, total + 1):
        train_step(model, optimizer, step)
        if step % every == 0:
            scheduler.step()
        if ranks.step():
            came.append(step)
    assert told == came
    assert len(told) == 2


@pytest.mark.parametrize("wrong", ["epoch", 0, -3, 1.5, True])
def test_an_interval_is_a_number_of_steps(wrong: Any) -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = lrs.CosineAnnealingLR(optimizer, 10)
    with pytest.raises(ValueError, match="lr_every is how many optimizer steps"):
        RankScheduler(model, optimizer, dynamic_rank(2), 10, lr_scheduler=scheduler, lr_every=wrong)


@pytest.mark.parametrize("source", [None, [0.1, 0.01]])
def test_an_interval_without_a_scheduler_is_refused(source: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match="leave lr_every out"):
        RankScheduler(model, sgd(model), dynamic_rank(2), 10, lr_scheduler=source, lr_every=1)


def test_a_state_goes_on_with_what_was_told() -> None:
    def ranks(state: Any = None) -> RankScheduler:
        torch.manual_seed(0)
        model = net()
        optimizer = sgd(model)
        scheduler = SILENT["lambda"](optimizer, 10)
        return RankScheduler(
            model, optimizer, dynamic_rank(2), 310, lr_scheduler=scheduler, lr_every=31, state=state
        )

    first = ranks()
    second = ranks(first.state_dict())
    assert second.phases() == first.phases()
    assert second.forecast.every == 31


@pytest.mark.parametrize("at", [1, 30, 31, 32, 45, 61, 62, 63])
def test_a_resumed_run_foresees_what_the_whole_one_does(at: int) -> None:
    """Its LR scheduler has been loaded before, and its copy begins in the middle."""

    def made(lr: Any = None, ranks: Any = None) -> tuple[Any, Any]:
        model = net()
        optimizer = sgd(model)
        scheduler = SILENT["lambda"](optimizer, 10)
        if lr is not None:
            scheduler.load_state_dict(lr)
            optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        how = {"lr_scheduler": scheduler, "state": ranks}
        return RankScheduler(model, optimizer, dynamic_rank(2), 310, **how), scheduler

    def go_on(ranks: RankScheduler, scheduler: Any, start: int, stop: int) -> None:
        for step in range(start + 1, stop + 1):
            ranks.optimizer[0].step()
            if step % 31 == 0:
                scheduler.step()
            ranks.step()

    whole, scheduler = made()
    go_on(whole, scheduler, 0, at)
    lr, state = scheduler.state_dict(), whole.state_dict()
    go_on(whole, scheduler, at, 100)
    resumed, scheduler = made(lr, state)
    go_on(resumed, scheduler, at, 100)
    assert resumed.forecast.rates == whole.forecast.rates
