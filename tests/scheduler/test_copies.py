"""A rank scheduler is copied and pickled with its model and optimizer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_run import LOW, STEPS, assert_same_bits, net, train_step
from torch.optim.lr_scheduler import StepLR

from dynarank import LRRewarmup, RankScheduler
from dynarank.forms import Plan
from dynarank.monitors.gradient_window import GradientWindow
from dynarank.schedules import Clock, Readings, dynamic_rank

LENGTH = 3
WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.deepcopy,
    "pickle": lambda parts: pickle.loads(pickle.dumps(parts)),
}


def module_function(clock: Clock, readings: Readings) -> Plan:
    return dict.fromkeys(readings.layers, LOW)


def made(schedule: Any = None, calibrated: bool = False) -> tuple[Any, ...]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = schedule or dynamic_rank(2, inflate=4, deflate=8, to="low-rank")
    moments: Any = GradientWindow(model, optimizer, length=LENGTH) if calibrated else "project"
    rates = StepLR(optimizer, 5)
    ranks = RankScheduler(
        model, optimizer, schedule, STEPS, moments=moments, lr_scheduler=rates, layers=["0", "2"],
        callbacks=[LRRewarmup(3)],
    )  # fmt: skip
    return model, optimizer, ranks, rates


def train(parts: tuple[Any, ...], start: int, stop: int) -> None:
    model, optimizer, ranks, rates = parts
    for step in range(start, stop):
        train_step(model, optimizer, step)
        ranks.step()
        rates.step()


def states(parts: tuple[Any, ...]) -> list[Any]:
    return [copy.deepcopy(part.state_dict()) for part in parts]


@pytest.mark.filterwarnings("ignore:Seems like")  # torch's, of copied schedulers
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_on_as_the_original_and_apart_from_it(way: str, calibrated: bool) -> None:
    for step in range(0, STEPS, 2):
        parts = made(calibrated=calibrated)
        train(parts, 0, step)
        copied, before = WAYS[way](parts), states(parts)
        assert copied[2].model is copied[0] and copied[2].optimizer == [copied[1]]
        train(copied, step, STEPS)
        assert_same_bits(states(parts), before)
        train(parts, step, STEPS)
        assert_same_bits(states(copied), states(parts))
        copied[2].close()
        assert not copied[1]._optimizer_step_pre_hooks
        assert not copied[1]._optimizer_load_state_dict_pre_hooks


def test_what_cannot_be_pickled_is_named_with_a_way_out() -> None:
    pickle.dumps(made(module_function))
    with pytest.raises(TypeError, match=r"its schedule cannot .*ranks\.state_dict\(\)"):
        pickle.dumps(made(lambda clock, readings: {"0": LOW}))
    copy.deepcopy(made(lambda clock, readings: {"0": LOW}))
