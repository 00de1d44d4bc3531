"""LR re-warm-up: the learning rate warmed up again after a change of form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from dynarank.forms import Change
from dynarank.scheduler.callbacks import Callback, Ranks
from dynarank.surgery.own_references import innermost

__all__ = ["LRRewarmup"]


class LRRewarmup(Callback):
    """Scales the learning rate by 1/n, 2/n, ..., 1 in the n steps after each change of form.

    The rate is scaled only during ``optimizer.step()`` and restored afterward, so an LR scheduler
    that computes the next rate from the current one never sees the scaled rate. Several warm-ups of
    one optimizer multiply their factors.

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
        >>> optimizer.step()
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
        self._hooks: list[Any] = []
        self._optimizers: list[Optimizer] = []

    @property
    def factor(self) -> float:
        """What the next step's learning rate is multiplied by."""
        return min(self.done + 1, self.steps) / self.steps if self.steps else 1.0

    def on_start(self, ranks: Ranks) -> None:
        """Register hooks around the steps of the scheduler's optimizers."""
        self._optimizers = [i for o in ranks.optimizer if self.steps > 1 for i in innermost(o)]
        for optimizer in self._optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._scale))
            self._hooks.append(optimizer.register_step_post_hook(self._restore))
            # A checkpoint made after a step that raised has the user's rate too.
            self._hooks.append(optimizer.register_state_dict_pre_hook(self._restore))

    def on_copy(self, ranks: Ranks) -> None:
        """Register the hooks on the copied optimizers."""
        self.on_start(ranks)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hooks": [], "_optimizers": []}

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
        """Go on with a warm-up.

        Raises:
            ValueError: it is not the state of a warm-up of so many steps.
        """
        done = state.get("done")
        if set(state) != {"done"} or type(done) is not int or not 0 <= done <= self.steps:
            raise ValueError(
                f"a warm-up of {self.steps} steps has done 0 to {self.steps} of them, the saved "
                f"one is {dict(state)!r}; give the same number of steps"
            )
        self.done = done

    def close(self) -> None:
        """Remove the hooks; a rate that is still scaled, because a step raised, is restored."""
        for hook in self._hooks:
            hook.remove()
        for optimizer in self._optimizers:
            if optimizer in _SCALED and self in _SCALED[optimizer].by:
                self._restore(optimizer)
        self._hooks, self._optimizers = [], []

    def _scale(self, optimizer: Optimizer, *_: object) -> None:
        scaled = _SCALED.get(optimizer)
        if scaled is not None and self in scaled.by:  # the last step raised before its end
            self._restore(optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        _SCALED.setdefault(optimizer, _Scaled(rates)).by.append(self)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor

    def _restore(self, optimizer: Optimizer, *_: object) -> None:
        """Give back the user's rates; the first warm-up of a step does it for all."""
        if (scaled := _SCALED.pop(optimizer, None)) is not None:
            for group, rate in zip(optimizer.param_groups, scaled.rates, strict=True):
                group["lr"] = rate


@dataclass
class _Scaled:
    """The user's rates during a step, and the warm-ups that have scaled them."""

    rates: list[Any]
    by: list[LRRewarmup] = field(default_factory=list["LRRewarmup"])


_SCALED: WeakKeyDictionary[Optimizer, _Scaled] = WeakKeyDictionary()  # only during a step
