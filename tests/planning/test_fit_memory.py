"""A budget of memory is kept at every step of a run, measured as it runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import dynarank as dr
from dynarank import RankScheduler
from dynarank.cost.memory import probe_memory
from dynarank.schedules import DynamicRank, FittedMemory, Rotating

STEPS = 40


def net() -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(6):
        parts += [nn.Linear(96, 96), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(96, 4))


X = torch.randn(8, 96)


def peaks(model: nn.Module, ranks: RankScheduler | None, optimizer: SGD) -> list[int]:
    found: list[int] = []
    for _ in range(STEPS):
        with probe_memory(model, [optimizer], torch.device("cpu")) as probe:
            model(X).square().mean().backward()
            optimizer.step()
        found.append(probe.peak_bytes)
        optimizer.zero_grad()
        if ranks is not None:
            ranks.step()
    return found


def full_peak() -> int:
    model = net()
    return max(peaks(model, None, SGD(model.parameters(), lr=1e-3, momentum=0.9)))


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.6, 0.45])
def test_no_step_of_the_run_is_above_the_budget(budget: float) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9)
    schedule = dr.fit_schedule(model, X, STEPS, memory=budget, optimizer=optimizer)
    assert isinstance(schedule, FittedMemory)
    ranks = RankScheduler(model, optimizer, schedule, STEPS)
    found = max(peaks(model, ranks, optimizer))
    assert found <= budget * full_peak()
    assert found == pytest.approx(schedule.peak_bytes, rel=0.02)


def test_full_rank_all_at_once_where_it_fits_else_a_share_at_a_time() -> None:
    def chosen(budget: float | int) -> object:
        schedule = dr.fit_schedule(net(), X, STEPS, memory=budget)
        assert isinstance(schedule, FittedMemory)
        return schedule.schedule

    assert isinstance(chosen(1.0), DynamicRank)
    assert isinstance(chosen(0.7), Rotating)
    assert isinstance(chosen(10**9), DynamicRank)


def test_an_impossible_budget_names_the_least_peak_and_changes_nothing() -> None:
    model = net()
    before = [(name, id(p)) for name, p in model.named_parameters()]
    message = r"memory budget of 1,000 bytes .*nearest possible is .* bytes"
    with pytest.raises(ValueError, match=message):
        dr.fit_schedule(model, X, STEPS, memory=1000)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    assert not any(isinstance(form, dr.LowRank) for form in dr.current_plan(model).values())


def test_a_fitted_schedule_is_the_same_after_a_resume() -> None:
    def ranks(budget: dict[str, Any]) -> RankScheduler:
        model = net()
        optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9)
        schedule = dr.fit_schedule(model, X, STEPS, optimizer=optimizer, **budget)
        return RankScheduler(model, optimizer, schedule, STEPS)

    for one, other in [({"memory": 0.7}, {"memory": 1.0}), ({"flops": 0.7}, {"flops": 0.6})]:
        first, second = ranks(one), ranks(other)
        assert second.schedule != first.schedule
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.schedule == first.schedule and second.layers == first.layers
