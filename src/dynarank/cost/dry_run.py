"""Dry runs: a few training steps on a copy of the model, to measure time and memory of a plan."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.cost.flops import run_batch
from dynarank.cost.memory import probe_memory
from dynarank.cost.stand_in import without_graphs
from dynarank.forms import Plan
from dynarank.layers.running import preserve_state
from dynarank.surgery.verbs import apply_plan

__all__ = ["DryRun", "dry_run"]


@dataclass(frozen=True)
class DryRun:
    """The measured time and memory of a training step under a plan.

    Args:
        seconds: the median time of a step: forward, backward and optimizer step.
        peak_bytes: the peak memory, as :func:`dynarank.cost.memory.probe_memory` measures it.
    """

    seconds: float
    peak_bytes: int


def dry_run(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    plans: Sequence[Plan],
    sample: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    rounds: int = 5,
) -> list[DryRun]:
    """Train copies of a model for a few steps under each plan, and measure time and memory.

    The model, its optimizers and the global random state do not change. The copies need additional
    memory, one at a time.

    Args:
        model: the model.
        optimizers: its optimizers.
        plans: the plans to try.
        sample: a batch: a tensor, a tuple or list of positional arguments of the forward pass, or a
            dict of keyword arguments; see :func:`dynarank.layers.running.forward_arguments`.
        loss: a function from the model's output to a scalar; None: the sum of all its tensors.
        rounds: the number of measured steps per plan, after a warm-up step; 0: measure the first
            step, which is enough for memory.

    Example:
        >>> from dynarank.forms import LowRank
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> low, full = dry_run(model, [], [{"0": LowRank(2)}, {}], torch.ones(8, 64))
        >>> low.peak_bytes < full.peak_bytes
        True
    """
    with preserve_state(model, grad=True):
        return [_dry_run(model, optimizers, plan, sample, loss, rounds) for plan in plans]


def _dry_run(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    plan: Plan,
    sample: Any,
    loss: Callable[[Any], Tensor] | None,
    rounds: int,
) -> DryRun:
    # The optimizer's copy has the parameters of the model's copy, and no hooks.
    twin, own = copy.deepcopy((model, list(optimizers)), without_graphs(model))
    apply_plan(twin, plan, optimizer=own, moments="reset")
    device = next(twin.parameters()).device
    seconds: list[float] = []
    with probe_memory(twin, own, device) as probe:
        seconds.append(_step(twin, own, sample, loss, device))
    for _ in range(rounds):
        _clear(own, twin)
        seconds.append(_step(twin, own, sample, loss, device))
    return DryRun(median(seconds[1:] or seconds), probe.peak_bytes)


def _step(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    sample: Any,
    loss: Callable[[Any], Tensor] | None,
    device: torch.device,
) -> float:
    begun = _now(device)
    run_batch(model, sample, loss).backward()
    for optimizer in optimizers:
        optimizer.step()
    return _now(device) - begun


def _clear(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    model.zero_grad()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
