"""The learning-rate schedule of a recipe, per step, with ``torch.optim.lr_scheduler``."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from dynarank.scheduler.lr_forecast import POINTS
from dynarank.train.optimizers import make_optimizer
from dynarank.train.own_code import calling, check_options, is_reference
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError

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

    One of the user's own is called as ``function(optimizer, total_steps)``.

    Args:
        recipe: the recipe.
        optimizer: the optimizer; the learning rates of its groups are the peak.
        total_steps: the number of optimizer steps of the run.

    Raises:
        RecipeError: the function raised an exception, or returned no LR scheduler of the optimizer.
    """
    if is_reference(recipe.lr_schedule):
        return _own(recipe, optimizer, total_steps)
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


def _own(recipe: Recipe, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    name, function = f"lr_schedule {recipe.lr_schedule!r}", recipe.load(recipe.lr_schedule)
    check_options(function, {}, name, more=2)
    with calling(name, recipe.root):
        made = function(optimizer, total_steps)
    if not isinstance(made, LRScheduler) or made.optimizer is not optimizer:
        raise RecipeError(f"{name} must return an LRScheduler of the optimizer, got {made!r}")
    if isinstance(made, ReduceLROnPlateau):
        raise RecipeError(f"{name}: ReduceLROnPlateau waits for a metric; LR schedules here do not")
    return made


def forecast_rates(recipe: Recipe, total_steps: int = POINTS) -> tuple[float, ...]:
    """The learning rate of a recipe, sampled at equidistant steps from the first to the last.

    Args:
        recipe: the recipe.
        total_steps: the number of optimizer steps of the run, which the named LR schedules do not
            depend on; one of the user's own may.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> rates = forecast_rates(load_recipe("cifar10-resnet20"))
        >>> len(rates), rates[0], round(rates[700], 6), round(rates[-1], 6)
        (1001, 0.1, 0.01, 0.001)
    """
    optimizer, steps = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate), POINTS
    if is_reference(recipe.lr_schedule):
        optimizer, steps = make_optimizer(recipe, nn.Linear(2, 2)), total_steps
    scheduler = make_lr_scheduler(recipe, optimizer, steps)
    rates = [float(optimizer.param_groups[0]["lr"])]
    with warnings.catch_warnings(), calling(f"lr_schedule {recipe.lr_schedule!r}", recipe.root):
        warnings.simplefilter("ignore")  # the optimizer takes no steps
        for _ in range(steps - 1):
            scheduler.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
    return tuple(rates[min(i * steps // (POINTS - 1), steps - 1)] for i in range(POINTS))
