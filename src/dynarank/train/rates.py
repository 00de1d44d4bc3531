"""The learning-rate schedule of a recipe, per step, with ``torch.optim.lr_scheduler``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from dynarank.scheduler.lr_forecast import POINTS

if TYPE_CHECKING:
    from dynarank.train.recipes import Recipe

__all__ = ["forecast_rates", "make_lr_scheduler"]


def make_lr_scheduler(recipe: Recipe, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Make the recipe's learning-rate scheduler, to be stepped after each optimizer step.

    At share s of the run, with peak p, final rate e = ``final_rate`` * p, and after a linear
    warm-up over share w (from p / (w * steps) to p)::

        constant     p
        multistep    p * decay_factor ** (number of decay_at that have passed)
        cosine       e + (p - e) (1 + cos(pi (s - w) / (1 - w))) / 2
        linear       p + (e - p) (s - w) / (1 - w)
        wsd          p until decay_at, then linear to e: warm-up, stable, decay
        onecycle     cosine up from p / 25 over w, then cosine down to nearly 0

    Args:
        recipe: the recipe.
        optimizer: the optimizer; the learning rates of its groups are the peak.
        total_steps: the number of optimizer steps of the run.
    """
    warm = round(recipe.warmup * total_steps)
    if recipe.lr_schedule == "onecycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(
            optimizer, peaks, total_steps, pct_start=recipe.warmup, cycle_momentum=False
        )
    rest = [_after_warmup(recipe, optimizer, total_steps, warm)]
    milestones: list[int] = []
    if recipe.lr_schedule == "wsd":
        decay = max(warm + 1, round(recipe.share(recipe.decay_at[0]) * total_steps))
        rest.append(LinearLR(optimizer, 1.0, recipe.final_rate, max(1, total_steps - decay)))
        milestones = [decay]
    if warm:
        rest.insert(0, LinearLR(optimizer, 1 / warm, 1.0, max(1, warm - 1)))
        milestones.insert(0, warm)
    return SequentialLR(optimizer, rest, milestones) if milestones else rest[0]


def _after_warmup(recipe: Recipe, optimizer: Optimizer, total_steps: int, warm: int) -> LRScheduler:
    """The schedule after warm-up; for ``wsd``, its stable part."""
    steps = max(1, total_steps - warm)
    if recipe.lr_schedule == "multistep":
        milestones = [round(recipe.share(at) * total_steps) - warm for at in recipe.decay_at]
        return MultiStepLR(optimizer, milestones, recipe.decay_factor)
    if recipe.lr_schedule == "cosine":
        end = recipe.learning_rate * recipe.final_rate
        return CosineAnnealingLR(optimizer, steps, end)
    if recipe.lr_schedule == "linear":
        return LinearLR(optimizer, 1.0, recipe.final_rate, steps)
    return ConstantLR(optimizer, 1.0, total_steps)


def forecast_rates(recipe: Recipe) -> tuple[float, ...]:
    """The learning rate of a recipe, sampled at equidistant steps from the first to the last.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> rates = forecast_rates(load_recipe("cifar10-resnet20"))
        >>> len(rates), rates[0], round(rates[700], 6), round(rates[-1], 6)
        (1001, 0.1, 0.01, 0.001)
    """
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    scheduler = make_lr_scheduler(recipe, stand_in, POINTS)
    rates: list[float] = []
    for _ in range(POINTS):
        rates.append(float(stand_in.param_groups[0]["lr"]))
        stand_in.step()
        scheduler.step()
    return tuple(rates)
