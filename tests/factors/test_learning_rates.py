"""A scaled step is the step with a scaled learning rate, for every optimizer and form."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from laws import assert_close
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import dynarank as dr
from dynarank.factors.learning_rates import FactorLearningRates
from dynarank.surgery.sites import survey

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.02),
    "momentum": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1, dampening=0.2),
    "nesterov": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: Adam(p, lr=0.02, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.02, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.02, momentum=0.5),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).double()
    return dr.factorize(model, {"0": 3, "2": 2})


def loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return model(x).square().mean().add(model(x).sin().sum())


def steps(model: nn.Module, optimizer: Optimizer, n: int, start: int = 0) -> None:
    for i in range(start, start + n):
        optimizer.zero_grad()
        loss(model, i).backward()
        optimizer.step()


def split_groups(model: nn.Module, multiplier: float, make: Callable) -> Optimizer:
    """The optimizer with a group of its own, and learning rate, for the factors."""
    low_rank = [s for s in survey(model) if isinstance(s.form, dr.LowRank)]
    factors = [p for s in low_rank for p in s.factors()]
    scaled = {id(p) for p in factors}
    optimizer = make([p for p in model.parameters() if id(p) not in scaled])
    optimizer.add_param_group({"params": factors, "lr": 0.02 * multiplier})
    return optimizer


def assert_equal_models(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("multiplier", [0.25, 2.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_a_group_with_a_scaled_learning_rate(name: str, multiplier: float) -> None:
    model = network()
    other = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    assert FactorLearningRates(model, optimizer, multiplier).paths() == ["0", "2"]
    steps(model, optimizer, 6)
    steps(other, split_groups(other, multiplier, OPTIMIZERS[name]), 6)
    assert_equal_models(model, other)
    assert optimizer.state_dict()["param_groups"] == before


@pytest.mark.parametrize("decomposition", ["svd", "tucker", "cp", "separable"])
def test_every_decomposition_is_scaled(decomposition: str) -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten(), nn.LazyLinear(3)).double()
    model(torch.zeros(1, 6, 3, 3).double())
    dr.factorize(model, 4, layers="0", decomposition=decomposition)
    other = copy.deepcopy(model)
    optimizer, split = SGD(model.parameters(), lr=0.02), split_groups(other, 3.0, OPTIMIZERS["sgd"])
    FactorLearningRates(model, optimizer, 3.0)
    for m, o in ((model, optimizer), (other, split)):
        m(torch.ones(2, 6, 3, 3).double()).square().sum().backward()
        o.step()
    assert_equal_models(model, other)


def test_a_step_with_a_closure_is_scaled() -> None:
    model, other = network(), network()
    optimizer, split = SGD(model.parameters(), lr=0.02), split_groups(other, 3.0, OPTIMIZERS["sgd"])
    FactorLearningRates(model, optimizer, 3.0)

    def closure() -> float:  # no parameter has a gradient before
        loss(model, 0).backward()
        return 0.0

    optimizer.step(closure)
    steps(other, split, 1)
    assert_equal_models(model, other)


class Wrapper:
    """As accelerate's: it is no subclass of Optimizer's with hooks of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list:
        return self.optimizer.param_groups

    @property
    def state(self) -> dict:
        return self.optimizer.state


def test_the_optimizer_inside_a_wrapper_is_scaled() -> None:
    model, other = network(), network()
    inner = SGD(model.parameters(), lr=0.02)
    FactorLearningRates(model, Wrapper(inner), 3.0)  # type: ignore[arg-type]
    steps(model, inner, 2)
    steps(other, split_groups(other, 3.0, OPTIMIZERS["sgd"]), 2)
    assert_equal_models(model, other)


def test_a_plain_step_differs_and_removed_hooks_do_nothing() -> None:
    model, other = network(), network()
    optimizer, plain = (OPTIMIZERS["sgd"](m.parameters()) for m in (model, other))
    rates = FactorLearningRates(model, optimizer, 0.5)
    steps(model, optimizer, 1)
    steps(other, plain, 1)
    assert torch.equal(model[3].weight, other[3].weight)
    assert not torch.allclose(model[0].up, other[0].up)
    rates.remove()
    other.load_state_dict(model.state_dict())
    steps(model, optimizer, 2, 1)
    steps(other, plain, 2, 1)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_only_low_rank_phases_of_a_schedule_are_scaled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    forms = dr.FullRank(), dr.LowRank(2), dr.FullRank(), dr.Adapted(2)
    schedule = dr.schedules.Phases([0, 0.25, 0.5, 0.75], forms)
    ranks = dr.RankScheduler(model, optimizer, schedule, 8, layers="0")
    rates = FactorLearningRates(model, optimizer, 3.0, layers="0")
    for step in range(8):
        twin, plain = copy.deepcopy((model, optimizer))
        scaled = step in (2, 3)
        assert rates.paths() == (["0"] if scaled else [])
        before = [p.detach().clone() for p in model.parameters()]
        steps(model, optimizer, 1, step)
        steps(twin, plain, 1, step)
        low = {id(p) for p in survey(model)[0].factors()} if scaled else set()
        for p, q, old in zip(model.parameters(), twin.parameters(), before, strict=True):
            assert_close(p.detach() - old, (q.detach() - old) * (3 if id(p) in low else 1), 1e-9)
        ranks.step()


def test_frozen_and_foreign_factors_are_left_alone() -> None:
    model = network()
    optimizer = SGD([*model[2].parameters()], lr=0.1)
    FactorLearningRates(model, optimizer, 0.5)
    before = model[0].up.detach().clone()
    model[2].down.requires_grad_(False)
    frozen = model[2].down.detach().clone()
    steps(model, optimizer, 1)
    assert torch.equal(before, model[0].up) and torch.equal(frozen, model[2].down)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("nan"), float("inf"), True])
def test_a_multiplier_is_positive_and_finite(multiplier: float) -> None:
    model = network()
    with pytest.raises(ValueError, match="positive and finite, got"):
        FactorLearningRates(model, SGD(model.parameters(), lr=0.1), multiplier)
