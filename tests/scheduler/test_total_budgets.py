"""A run under ``dynamic_rank(budget=)`` costs its budget, from the first step to a resumed end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import dynarank as dr
from dynarank import RankScheduler
from dynarank.cost.flops import trace
from dynarank.schedules import dynamic_rank, low_rank

STEPS = 200
MAKE: dict[str, Any] = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 10)
    ),
    "large head": lambda: nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 32)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.Flatten(), nn.Linear(432, 4)
    ),
}


def batch(name: str) -> Tensor:
    shapes = {"mlp": (16, 128), "large head": (16, 96), "convolutions": (4, 3, 7, 7)}
    return torch.randn(*shapes[name], generator=torch.Generator().manual_seed(0))


def run(name: str, schedule: Any, resumed_at: int | None = None) -> tuple[float, dict[str, Any]]:
    """The FLOPs of a run over those at full rank, and the last forms."""
    torch.manual_seed(0)
    model, x = MAKE[name](), batch(name)
    use = trace(model, x)
    full = use.flops(dict.fromkeys(use.layers, dr.FullRank())).training
    optimizer, spent = SGD(model.parameters(), lr=1e-3), 0
    ranks = RankScheduler(model, optimizer, schedule, STEPS)
    for step in range(STEPS):
        if step == resumed_at:
            model, saved = copy.deepcopy(model), ranks.state_dict()
            ranks.close()
            optimizer = SGD(model.parameters(), lr=1e-3)
            ranks = RankScheduler(model, optimizer, schedule, STEPS, state=saved)
        spent += use.flops(dr.current_plan(model)).training
        model(x).square().mean().backward()
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
    ranks.close()
    return spent / full / STEPS, dr.current_plan(model)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_a_run_costs_its_budget_wherever_it_is_resumed(name: str, budget: float) -> None:
    found, forms = run(name, dynamic_rank(budget=budget))
    assert found == pytest.approx(budget, rel=0.015)  # the first step is full-rank
    for at in (1, 30):
        again, same = run(name, dynamic_rank(budget=budget), resumed_at=at)
        assert again == pytest.approx(found, rel=0.005) and set(same) == set(forms)


@pytest.mark.parametrize("name", MAKE)
def test_without_arguments_any_model_can_follow(name: str) -> None:
    cost, forms = run(name, dynamic_rank())
    assert cost < 0.85 and any(form != dr.FullRank() for form in forms.values())


def test_fixed_low_rank_of_a_budget_waits_for_the_first_batch_without_a_warning() -> None:
    found, _ = run("mlp", low_rank(budget=0.4))
    assert 0.39 < found < 0.4 + 0.6 / STEPS  # ranks are rounded down


def test_a_budget_below_all_else_is_refused_by_the_first_step() -> None:
    with pytest.raises(
        ValueError,
        match=r"budget=0\.2 of .*; the smallest possible is 0\.\d+,",
    ):
        run("large head", dynamic_rank(budget=0.2))
