"""A budget that cannot be met is refused once, and the smallest one that it names is accepted."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dynarank as dr
from dynarank.forms import Within
from dynarank.schedules import decay, dynamic_rank, low_rank

STEPS = 60
RUNS: dict[str, Callable[[float, str], Any]] = {
    "dynamic_rank": lambda share, of: dynamic_rank(budget=Within(flops=share, of=of)),
    "total": lambda share, of: decay(total=Within(flops=share, of=of)),
    "late cuts": lambda share, of: decay(total=Within(flops=share, of=of), cuts=(0.1, 0.5)),
    "high": lambda share, of: decay(total=share, high=0.97),
    "end": lambda share, of: decay(end=Within(params=share, of=of)),
    "low_rank": lambda share, of: low_rank(budget=Within(flops=share, of=of)),
    "bytes": lambda share, of: low_rank(budget=Within(bytes=share, of=of)),
}
ADVICE = re.compile(r"smallest (?:possible is|ranks,) ([\d.,]*\d)")


def net(seed: int) -> tuple[nn.Module, torch.Tensor]:
    draw, kernels = random.Random(seed), seed % 3 == 2
    width, out = draw.choice((24, 32, 48)), draw.choice((10, 300, 900))
    x = torch.randn(draw.choice((1, 8)), *((3, 6, 6) if kernels else (width,)))
    if kernels:
        head = [nn.Flatten(), nn.Linear(width * 36, out)]
        convs = [nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)]
        return nn.Sequential(*convs, *head), x
    middle = [nn.Linear(width, width) for _ in range(draw.randint(1, 3))]
    return nn.Sequential(*middle, nn.Linear(width, out)), x


def advised(ask: Callable[[float], object], share: float) -> float | None:
    """The figure of the refusal; None if the share is accepted."""
    try:
        ask(share)
    except ValueError as error:
        told = str(error)
        assert repr(share) in told and "cannot be met: " not in told, told
        found = ADVICE.search(told)
        assert found, told
        figure = float(found[1])
        assert figure > share
        return figure
    return None


@pytest.mark.parametrize("of", ["model", "layers"])
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("seed", range(6))
def test_what_a_schedules_refusal_advises_is_accepted(seed: int, name: str, of: str) -> None:
    model, x = net(seed)

    def ask(share: float) -> None:
        dr.estimate(model, x, schedule=RUNS[name](share, of), total_steps=STEPS)

    for share in (0.003, 0.2, 0.65, 0.85):
        if (figure := advised(ask, share)) is not None:
            ask(figure)
            assert advised(ask, figure - 0.0002) is not None  # it is the smallest


@pytest.mark.parametrize("name", ["dynamic_rank", "total", "end"])
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_a_rank_scheduler_refuses_and_accepts_the_same(seed: int, name: str) -> None:
    model, x = net(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def ask(share: float) -> None:
        rule = RUNS[name](share, "model")
        dr.RankScheduler(model, optimizer, rule, STEPS, batches=lambda: [x]).close()

    if (figure := advised(ask, 0.01)) is not None:
        ask(figure)


@pytest.mark.parametrize("of", ["model", "layers"])
@pytest.mark.parametrize("kind", ["flops", "params", "bytes"])
@pytest.mark.parametrize("seed", range(6))
def test_what_plan_within_advises_is_accepted(seed: int, kind: str, of: Any) -> None:
    model, x = net(seed)
    for multiple_of in (None, 1, 8):

        def ask(amount: float, of: Any = of, multiple_of: int | None = multiple_of) -> None:
            dr.plan_within(model, x, **{kind: amount}, of=of, multiple_of=multiple_of)

        for share in (0.003, 0.4):
            if (figure := advised(ask, share)) is not None:
                ask(figure)
        with pytest.raises(ValueError, match=r"a budget of 7 .*smallest ranks, [\d,]+ ") as error:
            ask(7)
        found = ADVICE.search(str(error.value))
        assert found
        ask(least := int(found[1].replace(",", "")))
        with pytest.raises(ValueError, match="smallest ranks"):
            ask(least - 1)


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_what_fit_schedule_advises_is_accepted(seed: int) -> None:
    model, x = net(seed)

    def ask(share: float) -> None:
        schedule = dr.fit_schedule(model, x, STEPS, flops=share)
        dr.estimate(model, x, schedule=schedule, total_steps=STEPS)

    with pytest.raises(ValueError, match=r"a budget of 0.001 .*nearest possible is") as error:
        ask(0.001)
    found = re.search(r"possible is ([\d.]*\d)", str(error.value))
    assert found
    ask(float(found[1]))


def test_a_total_is_refused_in_the_unit_that_was_asked() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 300))
    for share in (0.8, 0.85):
        told = rf"budget={share} of the FLOPs cannot be met; the smallest possible is 0\.8\d+, "
        with pytest.raises(ValueError, match=told):
            schedule = dynamic_rank(budget=share)
            dr.estimate(model, torch.randn(8, 32), schedule=schedule, total_steps=60)
