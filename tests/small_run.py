"""A small net, its training step and all its state, for tests of whole runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, RankScheduler
from dynarank.forms import Form
from dynarank.schedules import dynamic_rank

LOW, FULL, LAST = LowRank(2), FullRank(), Adapted(2)
STEPS = 12
SCHEDULE = dynamic_rank(2, inflate=4, deflate=8)  # changes by the 4th and the 8th call of step


def net() -> nn.Sequential:
    """Layers "0" and "2" get cheaper at rank 2, "4" does not."""
    torch.manual_seed(0)
    parts = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*parts).double()


def sgd(model: nn.Module, **options: float) -> Optimizer:
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))  # type: ignore[arg-type]


def train_step(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    optimizer.step()


def poison(model: nn.Module, value: float, path: str = "2") -> None:
    """Set an entry of a layer's first parameter."""
    with torch.no_grad():
        next(model.get_submodule(path).parameters())[0, 0] = value


def forms(model: nn.Module) -> list[Form]:
    return list(dr.current_plan(model).values())


def snapshot(model: nn.Module, optimizer: Optimizer) -> tuple[object, ...]:
    """Everything that must be as it was: objects and values."""
    groups = [
        {k: list(map(id, v)) if k == "params" else v for k, v in group.items()}
        for group in optimizer.param_groups
    ]
    values = {name: (id(p), type(p), p.tolist()) for name, p in model.named_parameters()}
    states = {id(p): (id(s), str(s)) for p, s in optimizer.state.items()}
    return values, copy.deepcopy(groups), states, [type(module) for module in model.modules()]


@contextmanager
def untouched(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    before = snapshot(model, optimizer)
    yield
    assert snapshot(model, optimizer) == before


@dataclass
class Running:
    model: nn.Module
    optimizer: Optimizer
    ranks: RankScheduler

    def steps(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            train_step(self.model, self.optimizer, step)
            self.ranks.step()

    def state(self) -> list[dict[str, object]]:
        """Structure first, then weights, then optimizer."""
        holders = (self.ranks, self.model, self.optimizer)
        return [copy.deepcopy(holder.state_dict()) for holder in holders]

    def load(self, state: list[dict[str, object]]) -> None:
        self.ranks.load_state_dict(state[0])
        self.model.load_state_dict(state[1])
        self.optimizer.load_state_dict(state[2])


def assert_same_bits(one: object, two: object) -> None:
    assert type(one) is type(two)
    if isinstance(one, Tensor):
        assert torch.equal(one, two) and one.dtype == two.dtype  # type: ignore[arg-type, attr-defined]
    elif isinstance(one, dict):
        assert list(one) == list(two)  # type: ignore[call-overload]
        for key in one:
            assert_same_bits(one[key], two[key])  # type: ignore[index]
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)  # type: ignore[arg-type]
        for a, b in zip(one, two, strict=True):  # type: ignore[call-overload]
            assert_same_bits(a, b)
    else:
        assert one == two
