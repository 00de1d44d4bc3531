"""Which calls of ``RankScheduler.step`` follow a step that an optimizer really took.

A loop that accumulates gradients may call it after each micro-batch, and a gradient scaler skips
steps. Hooks of torch on the optimizers see the steps, whatever the loop does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from traceback import walk_stack
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from dynarank.surgery.guard import Guard
from dynarank.surgery.optimizer_steps import trains, unwatch_steps, watch_steps
from dynarank.surgery.own_references import groups_of, innermost, takes_hooks, wrapped

__all__ = ["RealSteps"]

# Calls in a row without a step after which the optimizer given is likely not the one that steps:
# gradients are seldom accumulated over so many batches.
PATIENCE = 256
_IDLE: WeakSet[RealSteps] = WeakSet()  # those that saw no step before their last call


class RealSteps:
    """Counts a call if one of the optimizers has stepped since the last, however many have.

    Optimizers without torch's hooks tell nothing: with one of them each call counts.

    Args:
        optimizers: those of a rank scheduler; steps are those of the innermost ones.
        guard: told of each step.
    """

    def __init__(self, optimizers: Sequence[Any], guard: Guard) -> None:
        self._guard = guard
        self._left = 0  # steps before: of a saved state, or of a call that raised
        self._stepped = self._told = self._first = False
        self._calls, self._other = 0, ""
        self.watch(optimizers)

    def watch(self, optimizers: Sequence[Any]) -> None:
        """Register hooks on these optimizers, which may be copies of those before."""
        self._optimizers = list(optimizers)
        steps = [one for given in optimizers for one in innermost(given)]
        hooked = [one for one in steps if takes_hooks(one)]
        self._sees_all = bool(steps) and len(hooked) == len(steps)
        self._hooks: list[Any] = []
        for one in hooked:
            self._hooks.append(one.register_step_pre_hook(self._before_step))
            self._hooks.append(one.register_step_post_hook(self._after_step))

    @property
    def uncounted(self) -> int:
        """The steps to count: 0 or 1, and what was left before."""
        return self._left + self._stepped

    def take(self) -> int:
        """The steps that a call is to count; they are left to the next until :meth:`count`."""
        self._left = self.uncounted if self._sees_all else 1
        self._stepped = False
        return self._left

    def load(self, uncounted: int) -> None:
        """Go on from a state in which so many steps were left to count."""
        self._left, self._stepped = uncounted, False

    def count(self) -> None:
        """The steps so far are counted."""
        self._left = 0
        self._calls, self._other = 0, ""
        _IDLE.discard(self)

    def idle(self) -> None:
        """A call followed no step; warn once if another optimizer takes the steps, it seems."""
        self._calls += 1
        if self._told:
            return
        _IDLE.add(self)
        watch_steps(_note)
        if self._other or self._calls == PATIENCE:
            self._told = True
            names = ", ".join(type(one).__name__ for one in self._optimizers)
            other = f"; {self._other}, which has its parameters too, steps instead"
            warnings.warn(
                f"ranks.step() was called {self._calls} times in a row without a step of {names}, "
                f"which the rank scheduler was given{other if self._other else ''}: no step is "
                "counted, and no layer changes form; give the optimizer that takes the steps",
                RuntimeWarning,
                stacklevel=3,
            )

    def note(self, optimizer: Optimizer) -> None:
        """Another optimizer is about to step, while those given do not."""
        mine = [one for given in self._optimizers for one in wrapped(given)]
        held = {id(p) for group in groups_of(mine) for p in group["params"]}
        if not any(one is optimizer for one in mine) and any(
            id(p) in held for group in optimizer.param_groups for p in group["params"]
        ):
            self._other = type(optimizer).__name__

    def close(self) -> None:
        """Remove the hooks; from now on each call counts."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._sees_all = [], False
        _IDLE.discard(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hooks": [], "_optimizers": []}

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        self._first = not optimizer.state
        self._guard.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return  # a gradient scaler has made a fused optimizer skip the step
        if self._first and _makes_states(optimizer):
            return
        self._stepped = True
        self._guard.after_step(optimizer)


def _note(optimizer: Optimizer) -> None:
    for one in list(_IDLE):
        one.note(optimizer)
    if not _IDLE:
        unwatch_steps(_note)


def _makes_states(optimizer: Optimizer) -> bool:
    """Whether a first step is no more than that: torch's DCP takes one, of rate 0 with zeros.

    Where there is nothing to make (SGD without momentum), each is a first step: who calls tells.
    """
    if trains(optimizer) or not _has_zero_gradients(optimizer):
        return False
    callers = (frame.f_code.co_name for frame, _ in walk_stack(None))
    return bool(optimizer.state) or "_init_optim_state" in callers


def _has_zero_gradients(optimizer: Optimizer) -> bool:
    """Whether there are gradients, and all are zero everywhere."""
    grads = (p.grad for group in optimizer.param_groups for p in group["params"])
    own = [getattr(g, "_local_tensor", g) for g in grads if g is not None]
    return bool(own) and not any(g.is_sparse or bool(g.any()) for g in own)
