from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_run import FULL, LOW, SCHEDULE, net, train_step
from stepping import one_step
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from dynarank import RankScheduler
from dynarank.scheduler.lr_rewarmup import LRRewarmup
from dynarank.schedules import Phases
from dynarank.surgery.own_references import innermost


def rates(rewarmup: int) -> tuple[list[float], list[float]]:
    """The rates that the optimizer used, and those that its groups held between its steps."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    used: list[float] = []
    ranks = RankScheduler(model, optimizer, SCHEDULE, 12, callbacks=[LRRewarmup(rewarmup)])
    optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    scheduler = CosineAnnealingLR(optimizer, 12)
    held: list[float] = []
    for step in range(12):
        train_step(model, optimizer, step)
        ranks.step()
        scheduler.step()
        held.append(optimizer.param_groups[0]["lr"])
    return used, held


def test_the_rate_is_scaled_after_each_change_and_the_scheduler_never_sees_it() -> None:
    plain, schedule = rates(0)
    warmed, seen = rates(3)
    assert seen == schedule  # recursive schedulers go on as without
    factors = [a / b for a, b in zip(warmed, plain, strict=True)]
    thirds = [1 / 3, 2 / 3, 1.0]  # changes come after the 4th and the 8th step
    assert factors == pytest.approx([1.0] * 4 + [*thirds, 1.0] + [*thirds, 1.0])


def test_a_warm_up_goes_on_after_a_resume() -> None:
    def parts(
        rewarmup: LRRewarmup,
    ) -> tuple[nn.Module, torch.optim.Optimizer, RankScheduler]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ranks = RankScheduler(model, optimizer, SCHEDULE, 12, callbacks=[rewarmup])
        return model, optimizer, ranks

    first, second = LRRewarmup(3), LRRewarmup(3)
    model, optimizer, ranks = parts(first)
    for step in range(5):
        train_step(model, optimizer, step)
        ranks.step()
    again = parts(second)[2]
    again.load_state_dict(ranks.state_dict())
    assert second.factor == first.factor == 2 / 3


def test_a_step_that_raises_leaves_the_rate_as_it_was() -> None:
    model, rewarmup = net(), LRRewarmup(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ranks = RankScheduler(model, optimizer, Phases([0, 1], [LOW, FULL]), 9, callbacks=[rewarmup])
    assert one_step(ranks) and rewarmup.factor == 1 / 4

    def broken() -> float:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        optimizer.step(broken)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_negative_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="steps >= 0, got -1"):
        LRRewarmup(-1)


@pytest.mark.parametrize(
    ("warm_ups", "factors"),
    [
        ({"0": [4], "2": [4]}, [1 / 16, 1 / 4, 9 / 16, 1.0]),  # two schedulers
        ({"0": [4, 2]}, [1 / 8, 1 / 2, 3 / 4, 1.0]),  # two callbacks of one
    ],
)
def test_several_warm_ups_of_one_optimizer_multiply_and_give_the_rate_back(
    warm_ups: dict[str, list[int]], factors: list[float]
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    used: list[float] = []
    schedulers: list[RankScheduler] = []
    for layer, steps in warm_ups.items():
        callbacks, phases = [LRRewarmup(n) for n in steps], Phases([0, 2], [LOW, FULL])
        ranks = RankScheduler(model, optimizer, phases, 40, layers=layer, callbacks=callbacks)
        schedulers.append(ranks)
    optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    for step in range(10):
        train_step(model, optimizer, step)
        assert optimizer.param_groups[0]["lr"] == 1.0
        for one in schedulers:
            one.step()
    assert used == [1.0, 1.0, *factors, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("count", [1, 2])
def test_closing_after_a_step_that_raised_gives_the_rate_back(count: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    warm = [LRRewarmup(4) for _ in range(count)]
    ranks = RankScheduler(model, optimizer, Phases([0, 1], [LOW, FULL]), 9, callbacks=warm)
    one_step(ranks)

    def broken() -> float:
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            optimizer.step(broken)
    assert optimizer.param_groups[0]["lr"] == 0.25**count
    ranks.close()
    assert optimizer.param_groups[0]["lr"] == 1.0


class SAM(torch.optim.Optimizer):
    """As https://github.com/davda54/sam writes it: its own ``step`` is not called."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=1.0)
        self.param_groups = self.base_optimizer.param_groups

    def second_step(self) -> None:
        self.base_optimizer.step()


class Several(torch.optim.Optimizer):
    """Steps an optimizer for each parameter."""

    def __init__(self, parameters: Any) -> None:
        self.optimizers = [torch.optim.SGD([p], lr=1.0) for p in parameters]
        groups = [group for one in self.optimizers for group in one.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups

    def second_step(self) -> None:
        for one in self.optimizers:
            one.step()


@pytest.mark.parametrize("wrapper", [SAM, Several])
def test_the_optimizers_that_a_wrapper_steps_are_warmed_up(
    wrapper: Callable[[Any], Any],
) -> None:
    model = net()
    optimizer = wrapper(model.parameters())
    ranks = RankScheduler(model, optimizer, SCHEDULE, 12, callbacks=[LRRewarmup(2)])
    used: list[float] = []
    for one in innermost(optimizer):
        one.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    for _ in range(5):
        used.clear()
        optimizer.second_step()
        ranks.step()
    assert set(used) == {0.5}
    assert {group["lr"] for group in optimizer.param_groups} == {1.0}


def test_a_checkpoint_after_a_step_that_raised_has_the_users_rate() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ranks = RankScheduler(model, optimizer, SCHEDULE, 12, callbacks=[LRRewarmup(4)])
    for step in range(4):
        train_step(model, optimizer, step)
        ranks.step()

    def interrupted() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 1.0
