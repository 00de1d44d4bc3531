"""How a recipe's learning rate runs, against the equations in the docstring."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dynarank.train.rates import forecast_rates, make_lr_scheduler
from dynarank.train.recipes import Recipe, load_recipe

PEAK, STEPS = 0.2, 100


def recipe(**changes: Any) -> Recipe:
    """Of 100 epochs of one step, so that epochs are steps."""
    free = {"epochs": STEPS, "learning_rate": PEAK, "decay_at": (), "inflate": 30, "deflate": 80}
    return Recipe.model_validate(load_recipe("digits").model_dump() | free | changes)


def rates(one: Recipe, steps: int = STEPS) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=one.learning_rate)
    scheduler = make_lr_scheduler(one, optimizer, steps)
    found: list[float] = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def wanted(one: Recipe, step: int) -> float:
    warm, end = round(one.warmup * STEPS), one.final_rate * PEAK
    if step < warm:
        return PEAK * (step + 1) / warm if warm > 1 else PEAK
    share = (step - warm) / (STEPS - warm)
    if one.lr_schedule == "multistep":
        return PEAK * one.decay_factor ** sum(step >= at for at in one.decay_at)
    if one.lr_schedule == "cosine":
        return end + (PEAK - end) * (1 + math.cos(math.pi * share)) / 2
    if one.lr_schedule == "linear":
        return PEAK + (end - PEAK) * share
    if one.lr_schedule == "wsd":
        start = one.decay_at[0]
        return PEAK + (end - PEAK) * max(0.0, (step - start) / (STEPS - start))
    return PEAK


@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.02, 0.1])
@pytest.mark.parametrize(
    ("kind", "decay_at", "final_rate"),
    [("constant", (), 0.0), ("multistep", (60, 90), 0.0)]
    + [
        (kind, decay_at, end)
        for kind, decay_at in (("cosine", ()), ("linear", ()), ("wsd", (70,)))
        for end in (0.0, 0.1)
    ],
)
def test_each_schedule_is_its_equation(
    kind: str, decay_at: tuple[int, ...], final_rate: float, warmup: float
) -> None:
    one = recipe(lr_schedule=kind, decay_at=decay_at, final_rate=final_rate, warmup=warmup)
    expected = [wanted(one, step) for step in range(STEPS)]
    assert rates(one) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_cycle_rises_to_its_peak_and_falls_to_almost_nothing() -> None:
    found = rates(recipe(lr_schedule="onecycle", warmup=0.3))
    top = found.index(max(found))
    assert found[0] == pytest.approx(PEAK / 25) and max(found) == pytest.approx(PEAK)
    assert top in (29, 30) and found[-1] < PEAK / 1e4
    assert found[: top + 1] == sorted(found[: top + 1]) and found[top:] == sorted(found[top:])[::-1]


@pytest.mark.parametrize("kind", ["multistep", "cosine", "linear", "wsd", "onecycle"])
def test_the_forecast_is_the_run_at_equal_distances(kind: str) -> None:
    one = recipe(
        lr_schedule=kind, warmup=0.1, decay_at=(70,) if kind in ("multistep", "wsd") else ()
    )
    forecast = forecast_rates(one)
    assert len(forecast) == 1001
    run = rates(one, 2002)
    near = [abs(f - r) for f, r in zip(forecast, run[::2], strict=True)]
    assert sum(near) / len(near) < 0.002 * PEAK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr_schedule": "wsd"}, "wsd has one decay"),
        ({"lr_schedule": "onecycle"}, "warmup must be above 0"),
        ({"decay_at": (90, 60)}, "decay_at must increase"),
        ({"decay_at": (100,)}, "decay_at must increase"),
        ({"decay_at": (10,), "warmup": 0.2}, "the warm-up's end, epoch 20"),
        ({"lr_schedule": "stairs"}, "lr_schedule"),
    ],
)
def test_a_learning_rate_that_makes_no_sense_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**change)
