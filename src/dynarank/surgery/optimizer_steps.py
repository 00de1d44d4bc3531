"""Watchers of every optimizer's steps, behind one hook of torch's.

A hook of torch's must not remove itself while it is called: with another one after it, the step
would raise "OrderedDict mutated during iteration". A watcher here can be removed at any time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["trains", "unwatch_steps", "watch_steps"]

Watcher = Callable[[Optimizer], None]
_WATCHERS: list[Watcher] = []
_HOOKED: list[object] = []


def watch_steps(watcher: Watcher) -> None:
    """From now on call it before each step of any optimizer."""
    if watcher not in _WATCHERS:
        _WATCHERS.append(watcher)
    if not _HOOKED:
        _HOOKED.append(register_optimizer_step_pre_hook(_before_step))


def unwatch_steps(watcher: Watcher) -> None:
    """Call it no more."""
    if watcher in _WATCHERS:
        _WATCHERS.remove(watcher)


def trains(optimizer: Optimizer) -> bool:
    """Whether its next step may change a parameter: torch's DCP makes states by one of rate 0."""
    rates = [torch.as_tensor(group.get("lr", 1), device="cpu") for group in optimizer.param_groups]
    return any(bool(rate.any()) for rate in rates)


def _before_step(optimizer: Optimizer, *_: object) -> None:
    for watcher in tuple(_WATCHERS):
        watcher(optimizer)
