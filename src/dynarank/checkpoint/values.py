"""Load values so that a failure can be taken back, without a copy of a model that fits.

What an optimizer or a table held before is kept by reference, schedulers are small and copied. A
module's tensors are written in place: they are copied first only if keys or shapes differ, which
is when its ``load_state_dict`` may refuse.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dynarank.surgery.edit import restore_on_exit
from dynarank.surgery.own_references import wrapped

__all__ = ["keep_optimizer", "load_modules", "load_other"]


def keep_optimizer(optimizer: Any, undo: ExitStack) -> None:
    """Have ``undo`` give an optimizer, and those that it wraps, the states that they have now."""
    for one in wrapped(optimizer):
        restore_on_exit(vars(one), undo)


def fits(one: Any, state: Any) -> bool:
    """Whether a module or an average certainly takes a state: its keys and shapes are the same."""
    read = getattr(one, "state_dict", dict[str, Any])
    own = cast(Mapping[str, Any], one) if isinstance(one, Mapping) else read()
    return _layout(own) == _layout(state)


def load_modules(
    pairs: Sequence[tuple[nn.Module, Mapping[str, Any]]], undo: ExitStack, *, keep: bool
) -> None:
    """Load the states of modules.

    Args:
        pairs: the modules and their states.
        undo: takes it back.
        keep: whether one of them may be refused: all are copied then, for ``undo``.

    Raises:
        ValueError: keys are missing or unknown, or sizes differ.
    """
    for one, _ in pairs if keep else ():
        _keep_values(one, undo)
    for one, state in pairs:
        try:
            one.load_state_dict(state)
        except RuntimeError as error:  # torch's, of missing and unknown keys and of sizes
            raise ValueError(
                f"the checkpoint is of another {type(one).__name__}, build it as it was then: "
                f"{error}"
            ) from error


def load_other(name: str, one: Any, state: Any, undo: ExitStack, *, keep: bool = True) -> None:
    """Load the state of a scheduler, a scaler or an average that is no module.

    ``keep``: whether what it has now is copied, for ``undo``.

    Raises:
        ValueError: it is that of a dictionary with other keys, or of another LR scheduler.
    """
    if isinstance(one, MutableMapping):
        table = cast(MutableMapping[Any, Any], one)
        if table and (other := table.keys() ^ state.keys()):
            raise ValueError(
                f"{name}= has other keys than in the checkpoint ({len(other)} differ, such as "
                f"{min(other, key=str)!r}); give the same dictionary, or an empty one"
            )
        undo.callback(table.update, dict(table))
        undo.callback(table.clear)
        table.update(state)
        return
    before = one.state_dict() if hasattr(one, "state_dict") else None
    if isinstance(one, LRScheduler) and before is not None:
        _check_kind(name, one, before, state)
    if hasattr(one, "__dict__"):
        restore_on_exit(vars(one), undo)
    if before is not None and keep:
        undo.callback(one.load_state_dict, copy.deepcopy(before))
    one.load_state_dict(state)


def _check_kind(name: str, one: Any, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise ValueError if each has what the other lacks: versions of one class only add to it."""
    if (lacks := own.keys() - saved.keys()) and (extra := saved.keys() - own.keys()):
        raise ValueError(
            f"{name}= is a {type(one).__name__}, the checkpoint's was another class: its state has "
            f"{min(extra)!r} and no {min(lacks)!r}; make the same LR scheduler as in the saved "
            f"run, or leave {name} out"
        )


def _layout(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: v.shape if isinstance(v, Tensor) else None for key, v in state.items()}


def _keep_values(module: nn.Module, undo: ExitStack) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    values = [t.detach().clone() for t in tensors if not t.is_meta]
    undo.callback(_write, [t for t in tensors if not t.is_meta], values)
    for one in module.modules():
        restore_on_exit(one._buffers, undo)  # pyright: ignore[reportPrivateUsage]


@torch.no_grad()
def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
