"""LR re-warm-up: the learning rate warmed up again after a change of form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from dynarank.forms import Change
from dynarank.scheduler.callbacks import Callback, Ranks

__all__ = ["LRRewarmup"]


class LRRewarmup(Callback):
    """Scales the learning rate by 1/n, 2/n, ..., 1 in the n steps after each change of form.

    The rate is scaled only during ``optimizer.step()`` and restored afterward, so an LR scheduler
    that computes the next rate from the current one never sees the scaled rate.

    Args:
        steps: n; with 0 or 1 nothing is scaled.

    Raises:
        ValueError: a negative number of steps.

    Example:
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> schedule = dr.schedules.dynamic_rank(2, inflate=1, deflate=8)
        >>> rewarmup = LRRewarmup(steps=4)
        >>> ranks = dr.RankScheduler(model, optimizer, schedule, 10, callbacks=[rewarmup])
        >>> len(ranks.step()), rewarmup.factor
        (1, 0.25)

    Source: Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695,
    2023, where the rate is warmed up after each restart.
    """

    def __init__(self, steps: int) -> None:
        if steps < 0:
            raise ValueError(f"the rate is warmed up over a number of steps >= 0, got {steps}")
        self.steps = steps
        self.done = steps  # of a warm-up: all, as long as there was no change
        self._rates: dict[int, list[Any]] = {}
        self._hooks: list[Any] = []

    @property
    def factor(self) -> float:
        """What the next step's learning rate is multiplied by."""
        return min(self.done + 1, self.steps) / self.steps if self.steps else 1.0

    def on_start(self, ranks: Ranks) -> None:
        """Register hooks around the steps of the scheduler's optimizers."""
        for optimizer in ranks.optimizer if self.steps > 1 else ():
            self._hooks.append(optimizer.register_step_pre_hook(self._scale))
            self._hooks.append(optimizer.register_step_post_hook(self._restore))

    def after_step(self, ranks: Ranks) -> None:
        """Count the step."""
        self.done = min(self.done + 1, self.steps)

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        """Begin to warm up with the next step, unless training has not begun."""
        if ranks.last_step:
            self.done = 0

    def state_dict(self) -> dict[str, Any]:
        """How many steps of a warm-up are done."""
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a warm-up."""
        self.done = int(state["done"])

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _scale(self, optimizer: Optimizer, *_: object) -> None:
        if id(optimizer) in self._rates:  # the last step raised before it could be put back
            self._restore(optimizer)
        self._rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor

    def _restore(self, optimizer: Optimizer, *_: object) -> None:
        rates = self._rates.pop(id(optimizer))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
