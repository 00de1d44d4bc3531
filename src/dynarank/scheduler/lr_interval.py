"""How often an LR scheduler is stepped: as the user says, or as its own length tells.

An LR scheduler counts its steps, and does not know how many optimizer steps pass between two of
them: one if it is stepped after each batch, as many as an epoch has if it is stepped after each
epoch. One that is as long as the run tells which.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any

from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

from dynarank.schedules.base import Readings, Schedule
from dynarank.schedules.timelines import timeline

__all__ = [
    "WAYS",
    "check_lr_every",
    "follows_learning_rate",
    "inner_lr_scheduler",
    "interval_told",
    "likely_interval",
    "steps_per_call",
]

_TRIED = 1000  # steps of the run on which a schedule is tried
WAYS = (
    "give lr_every=1 if lr_scheduler.step() is called after each optimizer step, or "
    "lr_every=len(loader) if it is called once an epoch"
)


def check_lr_every(every: Any, lr_scheduler: object) -> int | None:
    """The number of optimizer steps from one step of the LR scheduler to the next, if given.

    Raises:
        ValueError: it is no whole number of 1 or more, or there is no LR scheduler.

    Example:
        >>> check_lr_every("epoch", None)
        Traceback (most recent call last):
        ValueError: lr_every is how many optimizer steps pass from one lr_scheduler.step() to ...
    """
    if every is None:
        return None
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise ValueError(
            "lr_every is how many optimizer steps pass from one lr_scheduler.step() to the next, a "
            f"whole number of 1 or more, got {every!r}; {WAYS}"
        )
    if lr_scheduler is None or isinstance(lr_scheduler, Sequence):
        raise ValueError(
            f"lr_every={every} says how often lr_scheduler is stepped, and lr_scheduler is "
            f"{'not given' if lr_scheduler is None else 'a list of the learning rates of the run'};"
            " leave lr_every out"
        )
    return int(every)


def inner_lr_scheduler(lr_scheduler: Any) -> Any:
    """The LR scheduler of torch inside those of trainers (Accelerate's, Lightning's config).

    Example:
        >>> from types import SimpleNamespace
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> config = SimpleNamespace(scheduler=CosineAnnealingLR(optimizer, 30), interval="step")
        >>> type(inner_lr_scheduler(config)).__name__
        'CosineAnnealingLR'
    """
    *_, last = _nested(lr_scheduler)
    return last


def interval_told(lr_scheduler: Any) -> int | None:
    """1 if Lightning's config says that it is stepped after each optimizer step; None: unknown."""
    for one in _nested(lr_scheduler):
        if getattr(one, "interval", None) == "step" and getattr(one, "frequency", 1) == 1:
            return 1
    return None


def steps_per_call(lr_scheduler: Any) -> int:
    """The steps that torch's LR scheduler makes in one call: Accelerate's makes one a process.

    Unless batches are split over the processes, it takes their number for how much faster an epoch
    passes.
    """
    for one in _nested(lr_scheduler):
        for cls in type(one).__mro__:
            if cls.__name__ == "AcceleratedScheduler":
                if one.split_batches or not one.step_with_optimizer:
                    return 1
                return int(vars(sys.modules[cls.__module__])["AcceleratorState"]().num_processes)
    return 1


def _nested(lr_scheduler: Any) -> list[Any]:
    """An LR scheduler and those that it wraps and that have the optimizer, torch's last."""
    found = [lr_scheduler]
    while not hasattr(found[-1], "optimizer") and hasattr(found[-1], "scheduler"):
        found.append(found[-1].scheduler)
    return found


def likely_interval(lr_scheduler: object, total_steps: int) -> int | None:
    """The optimizer steps from one step of an LR scheduler to the next, if its length tells.

    A scheduler as long as the run is stepped after each optimizer step; one of which the run's
    length is a multiple, after each epoch of so many steps. Warm-ups, milestones and functions do
    not tell.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> cosine = CosineAnnealingLR(optimizer, T_max=30)
        >>> [likely_interval(cosine, total) for total in (30, 3000, 3100)]
        [1, 100, None]
    """
    length = _length(lr_scheduler)
    return total_steps // length if length and total_steps % length == 0 else None


def _length(scheduler: Any) -> int | None:
    """The number of steps after which a scheduler has run its course; None if it does not tell."""
    if isinstance(scheduler, OneCycleLR):
        return scheduler.total_steps
    if isinstance(scheduler, CosineAnnealingLR):
        return int(scheduler.T_max)
    if isinstance(scheduler, PolynomialLR):
        return scheduler.total_iters
    if isinstance(scheduler, LinearLR):  # a warm-up ends long before the run
        return scheduler.total_iters if scheduler.end_factor < scheduler.start_factor else None
    if isinstance(scheduler, LambdaLR):  # those of transformers say how many steps they train
        function = scheduler.lr_lambdas[0]
        known = function.keywords if isinstance(function, partial) else {}
        return known.get("num_training_steps")
    if isinstance(scheduler, SequentialLR):
        last = _length(_parts(scheduler)[-1])
        return None if last is None else last + getattr(scheduler, "_milestones")[-1]  # noqa: B009
    if isinstance(scheduler, ChainedScheduler):
        return max((n for part in _parts(scheduler) if (n := _length(part))), default=None)
    return None


def _parts(scheduler: Any) -> Sequence[Any]:
    return scheduler._schedulers


def follows_learning_rate(schedule: Schedule, readings: Readings, total_steps: int) -> bool:
    """Whether a schedule's transition points depend on the forecast of the learning rate.

    It is asked with an early and with a late decay of the learning rate.
    """
    total = min(total_steps, _TRIED)

    def phases(decay: float) -> list[tuple[int, object]]:
        rates = tuple(1.0 if i < decay * _TRIED else 0.01 for i in range(_TRIED + 1))
        seen = replace(readings, forecast=rates)
        return [(phase.start, phase.plan) for phase in timeline(schedule, seen, total)]

    return phases(0.25) != phases(0.75)
