"""Optimizer states that are loaded before the rank scheduler's: they must not get lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

from dynarank.surgery.edit import restore_on_exit

__all__ = ["OptimizerLoads", "inner_optimizer"]

# The entries of a state with the shape of the parameter, in torch's optimizers.
_SHAPED = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class OptimizerLoads:
    """Watches what is loaded into optimizers between two steps.

    torch loads optimizer states by position, so a state of a model with other forms would be loaded
    into the wrong parameters: it is refused. One that fits is loaded, and if the forms are restored
    only after that, :meth:`again` loads it into the new parameters.

    Args:
        optimizers: those of the rank scheduler.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._incoming: dict[str, Any] = {}
        self._loaded: list[tuple[Optimizer, dict[str, Any]]] = []
        self._hooks: list[Any] = []
        for one in map(inner_optimizer, optimizers):
            if isinstance(one, Optimizer):
                self._hooks += [
                    one.register_load_state_dict_pre_hook(self._check),
                    one.register_load_state_dict_post_hook(self._keep),
                ]

    def forget(self) -> None:
        """Training goes on: what was loaded is settled."""
        self._loaded = []

    def again(self, undo: ExitStack) -> None:
        """Load the states once more where they fit; rates and the like stay as they are now."""
        loaded, self._loaded = self._loaded, []
        for optimizer, state in loaded:
            if _misfit(optimizer, state):  # of an earlier load: the right one is still to come
                continue
            restore_on_exit(vars(optimizer), undo)
            groups = zip(optimizer.param_groups, state["param_groups"], strict=True)
            now = [{**mine, "params": given["params"]} for mine, given in groups]
            optimizer.load_state_dict({**state, "param_groups": now})
        self.forget()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.forget()

    def _check(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if misfit := _misfit(optimizer, state):
            raise ValueError(
                f"the optimizer's state does not fit its parameters: {misfit}. If it was saved "
                "while layers had other forms, load the rank scheduler's state first, then those "
                "of the model and the optimizer"
            )
        self._incoming = state

    def _keep(self, optimizer: Optimizer) -> None:
        others = [pair for pair in self._loaded if pair[0] is not optimizer]
        self._loaded = [*others, (optimizer, self._incoming)]
        self._incoming = {}


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside a wrapper that has it as ``optimizer`` (accelerate's, for example)."""
    seen = {id(optimizer)}
    while (inner := getattr(optimizer, "optimizer", None)) is not None and id(inner) not in seen:
        optimizer = inner
        seen.add(id(inner))
    return optimizer


def _misfit(optimizer: Optimizer, state: Mapping[str, Any]) -> str:
    """Why a state does not belong to the optimizer's parameters as they are; empty if it does."""
    counts = [
        [len(group["params"]) for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    ]
    if counts[0] != counts[1]:
        return f"its groups have {counts[0]} parameters, the optimizer's have {counts[1]}"
    indices = chain.from_iterable(group["params"] for group in state["param_groups"])
    held = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, parameter in zip(indices, held, strict=True):
        entries: Mapping[str, Any] = state["state"].get(index) or {}
        for key in _SHAPED:
            value = entries.get(key)
            if isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                shapes = tuple(value.shape), tuple(parameter.shape)
                return f"its {key} {index} has the shape {shapes[0]}, the parameter {shapes[1]}"
    return ""
