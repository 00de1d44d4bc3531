"""FSDP2 under Accelerate: what torch's state dicts for several processes need of an optimizer.

They ask for a state of each parameter that trains, and make what is missing by a step of rate zero.
A parameter that a change has just made has none until its first step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from dynarank.checkpoint.values import keep_optimizer
from dynarank.surgery.own_references import inner_optimizer

__all__ = ["blank_states", "without_states"]


def without_states(model: nn.Module, optimizers: Sequence[Any]) -> list[str]:
    """The names of the parameters that train and have no state in their optimizer.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> without_states(model, [torch.optim.AdamW(model.parameters())])
        ['weight', 'bias']
    """
    held = {id(p): one for one in optimizers for g in one.param_groups for p in g["params"]}
    own = ((name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) in held)
    return [name for name, p in own if not held[id(p)].state.get(p)]


@contextmanager
def blank_states(
    model: nn.Module, optimizers: Sequence[Any], without: Iterable[str], undo: ExitStack
) -> Generator[None]:
    """Within it, states can be loaded of all parameters but those that were saved without one.

    Args:
        model: with the forms of the saved run.
        optimizers: their states are dropped.
        without: the names of :func:`without_states` when it was saved: these do not train within.
        undo: a stack of what takes it all back.
    """
    for one in optimizers:
        keep_optimizer(one, undo)
        inner_optimizer(one).state = defaultdict(dict)
        for p in (p for group in one.param_groups for p in group["params"]):
            undo.callback(setattr, p, "grad", p.grad)
            p.grad = None  # an optimizer whose parameters have gradients is taken for initialized
    named = dict(model.named_parameters())
    still = [p for name in without if (p := named.get(name)) is not None and p.requires_grad]
    try:
        for p in still:
            p.requires_grad_(False)
        yield
    finally:
        for p in still:
            p.requires_grad_(True)
