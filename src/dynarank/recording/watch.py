"""What a recorder sees of a loop: the first training batch, each optimizer step, each change.

Hooks on the model, and a callback of the rank scheduler or a hook on the optimizer. Copies of the
model, the rank scheduler and the optimizer are not watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from dynarank.cost.memory import SavedTensors, saved_tensors
from dynarank.forms import Change
from dynarank.scheduler.callbacks import Callback, Ranks
from dynarank.scheduler.rank_scheduler import RankScheduler
from dynarank.surgery.own_references import inner_optimizer, takes_hooks

__all__ = ["Listening", "watch"]

_NAME = "Recorder"


class Listening(Protocol):
    """What a recorder does with what is seen."""

    @property
    def probing(self) -> bool:
        """Whether forward passes that record gradients are to be looked at."""
        ...

    def began(self, batch: Any) -> None:
        """A training forward pass begins, with these arguments."""

    def saved(self, tensors: SavedTensors) -> None:
        """A forward pass has saved these tensors for the backward pass."""

    def stepped(self) -> None:
        """An optimizer step was done; forms have not changed yet."""

    def changed(self, changes: list[Change]) -> None:
        """Layers have changed form after the step."""

    def checkpointed(self) -> None:
        """The optimizer's state is about to be taken, as for a checkpoint."""


def watch(
    model: nn.Module, ranks: RankScheduler | None, optimizer: Any, listener: Listening
) -> ExitStack:
    """Watch a loop; closing the stack ends it.

    Raises:
        ValueError: a recorder watches the rank scheduler already.
    """
    stack, inner = ExitStack(), inner_optimizer(optimizer)
    if ranks is not None:
        if _NAME in ranks.callbacks:
            raise ValueError("this rank scheduler has a recorder already; close() that one first")
        ranks.callbacks[_NAME] = _Observer(listener)
        stack.callback(ranks.callbacks.pop, _NAME, None)
    else:
        stack.callback(inner.register_step_post_hook(_AfterStep(listener)).remove)
    if isinstance(inner, Optimizer) and takes_hooks(inner):
        stack.callback(inner.register_state_dict_pre_hook(_BeforeState(listener)).remove)
    hooks = _ForwardHooks(model, listener)
    before = model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    after = model.register_forward_hook(hooks.after, always_call=True)
    stack.callback(before.remove)
    stack.callback(after.remove)
    _watch_compiled(model, hooks, stack)
    return stack


class _Watcher:
    """Has a listener; a copy has none."""

    def __init__(self, listener: Listening | None) -> None:
        self.listener = listener

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(None)

    def __reduce__(self) -> Any:
        return type(self), (None,)


class _Observer(_Watcher, Callback):
    """The callback of the rank scheduler."""

    def after_step(self, ranks: Ranks) -> None:
        if self.listener is not None:
            self.listener.stepped()

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        if self.listener is not None:
            self.listener.changed(changes)


class _AfterStep(_Watcher):
    def __call__(self, *args: Any) -> None:
        if self.listener is not None:
            self.listener.stepped()


class _BeforeState(_Watcher):
    def __call__(self, *args: Any) -> None:
        if self.listener is not None:
            self.listener.checkpointed()


class _ForwardHooks:
    """Hooks around a forward pass; bound methods of a copy see nothing."""

    def __init__(self, model: nn.Module | None, listener: Listening | None) -> None:
        self.model, self.listener = model, listener
        self._open: tuple[AbstractContextManager[SavedTensors], SavedTensors] | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note the arguments and what is saved, in a training pass that is to be looked at."""
        if torch.compiler.is_compiling() or self.listener is None or not self.listener.probing:
            return
        if torch.is_grad_enabled() and self._open is None:
            self.listener.began(arguments(module, args, named))
            context = saved_tensors()
            self._open = context, context.__enter__()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """End it, whether or not the pass has failed."""
        if torch.compiler.is_compiling() or self._open is None:
            return
        (context, saved), self._open = self._open, None
        context.__exit__(None, None, None)
        if self.listener is not None:
            self.listener.saved(saved)

    def __deepcopy__(self, memo: Any) -> _ForwardHooks:
        return _ForwardHooks(None, None)

    def __reduce__(self) -> Any:
        return _ForwardHooks, (None, None)


def arguments(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The arguments of a forward pass as a batch; tensors are detached, not copied."""
    if named and args:
        bound = inspect.signature(module.forward).bind(*args, **named)
        args, named = (), bound.arguments
    return tree_map_only(Tensor, Tensor.detach, dict(named) if named else args)


def _watch_compiled(model: nn.Module, hooks: _ForwardHooks, stack: ExitStack) -> None:
    """See the first batch of a model compiled in place, whose hooks are part of its graph."""
    compiled: Callable[..., Any] | None = getattr(model, "_compiled_call_impl", None)
    if compiled is None:
        return

    def give_back() -> None:
        if vars(model).get("_compiled_call_impl") is first:
            setattr(model, "_compiled_call_impl", compiled)  # noqa: B010

    def first(*args: Any, **named: Any) -> Any:
        listener = hooks.listener
        if listener is not None and torch.is_grad_enabled():
            give_back()
            listener.began(arguments(model, args, named))
        return compiled(*args, **named)

    setattr(model, "_compiled_call_impl", first)  # noqa: B010
    stack.callback(give_back)
