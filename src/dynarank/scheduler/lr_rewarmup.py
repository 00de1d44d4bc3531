"""The learning rate warmed up again after a change of form.

The rate that the user's scheduler has set is scaled only while the optimizer steps, and put back
as it was: schedulers that compute a rate from the last one never see the scaled one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

__all__ = ["LRRewarmup"]


class LRRewarmup:
    """Scales the learning rate by 1/n, 2/n, ..., 1 in the n steps after a change.

    Args:
        optimizers: whose rates to scale.
        steps: n; 0 or 1 scales nothing.

    Raises:
        ValueError: a negative number of steps.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(()))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> rewarm = LRRewarmup([optimizer], steps=4)
        >>> rewarm.restart()
        >>> weight.grad = torch.tensor(-1.0)
        >>> optimizer.step(), rewarm.advance(), optimizer.step()
        (None, None, None)
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (0.75, 1.0)

    Reference:
        Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695, 2023
        warm up after each restart.
    """

    def __init__(self, optimizers: Sequence[Optimizer], steps: int) -> None:
        if steps < 0:
            raise ValueError(f"the rate is warmed up over a number of steps >= 0, got {steps}")
        self.steps = steps
        self.done = steps  # of a warm-up: all, as long as there was no change
        self._rates: dict[int, list[Any]] = {}
        if steps > 1:
            for optimizer in optimizers:
                optimizer.register_step_pre_hook(self._scale)
                optimizer.register_step_post_hook(self._restore)

    @property
    def factor(self) -> float:
        """What the next step's learning rate is multiplied by."""
        return min(self.done + 1, self.steps) / self.steps if self.steps else 1.0

    def restart(self) -> None:
        """Begin to warm up with the next step."""
        self.done = 0

    def advance(self) -> None:
        """Count a step."""
        self.done = min(self.done + 1, self.steps)

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
