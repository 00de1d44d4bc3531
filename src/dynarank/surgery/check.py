"""The check of a training state on demand: do model, optimizer and what follows them agree?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from dynarank.distributed.fsdp2 import reshard
from dynarank.distributed.unwrap import unwrapped
from dynarank.surgery.averages import average_problems
from dynarank.surgery.left_behind import replaced_problems
from dynarank.surgery.lr_groups import lr_problems
from dynarank.surgery.optimizer_fit import group_problems, state_problems, value_problems
from dynarank.surgery.optimizer_state import Optimizers, as_list
from dynarank.surgery.problem import Problem
from dynarank.surgery.structure import structure_problems, tie_problems
from dynarank.surgery.transaction import differences
from dynarank.surgery.wrapper_fit import key_problems, wrapper_problems

__all__ = ["InvariantError", "check"]


class InvariantError(RuntimeError):
    """What is broken in a training state: ``problems``, each with its invariant and place."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(["the training state is broken:", *map(str, problems)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def check(
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    lr_scheduler: Any = None,
    ema: Any = None,
    ranks: Any = None,
) -> None:
    """Check that a model and what trains it agree; what is broken is named in one error.

    === ========================================================================================
    I1  each parameter that trains is in exactly one group of the optimizers
    I2  groups and states hold no parameter that is not the model's
    I3  states have the shape, dtype and device of their parameters
    I4  the LR scheduler drives these optimizers, and has a rate for each group
    I5  the average (EMA) has the model's names, shapes and forms
    I6  tied weights are tied wholly, as the model declares
    I7  each layer has the parameters of its form, a frozen base, and the rank scheduler's form
    I8  DDP and FSDP know each parameter that trains
    I9  no container still holds a parameter that a change replaced
    I10 weights, gradients, buffers and states are finite
    I11 no wrapper inside the model puts its name into saved keys
    === ========================================================================================

    Nothing is changed. Call it between steps, when gradients are zero or finite; it reads every
    tensor once.

    Args:
        model: any model, wrapped or not.
        optimizer: every optimizer that trains it (in a list); None: I1 to I3 are not checked.
        lr_scheduler: its LR scheduler, or several in a list.
        ema: an averaged copy: a module (``AveragedModel``), an object with one, or a dictionary of
            tensors.
        ranks: the :class:`RankScheduler`.

    Raises:
        InvariantError: something is broken; its ``problems`` are in the order above.
        TypeError: an argument is something else.

    Example:
        >>> model = dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> check(model, optimizer)
        >>> _ = dr.inflate(model)  # without optimizer=
        >>> check(model, optimizer)
        Traceback (most recent call last):
        dynarank.surgery.check.InvariantError: the training state is broken:
        I1 0.weight: it trains, and is in none of the optimizers given, ...
    """
    problems = list(_problems(model, as_list(optimizer), lr_scheduler, ema, ranks))
    if problems:
        raise InvariantError(sorted(problems, key=lambda one: int(one.invariant[1:])))


def _problems(
    model: nn.Module, optimizers: list[Any], lr_scheduler: Any, ema: Any, ranks: Any
) -> Iterator[Problem]:
    core = unwrapped(model)
    reshard(core.modules())
    if optimizers:
        yield from group_problems(core, optimizers)
        yield from state_problems(core, optimizers)
    if lr_scheduler is not None:
        yield from lr_problems(lr_scheduler, optimizers)
    if ema is not None:
        yield from average_problems(core, ema)
    yield from tie_problems(core)
    yield from structure_problems(core)
    if ranks is not None:
        yield from _rank_problems(core, optimizers, ranks)
    yield from wrapper_problems(model)
    yield from replaced_problems(core, optimizers)
    yield from value_problems(core)
    yield from key_problems(model)


def _rank_problems(model: nn.Module, optimizers: list[Any], ranks: Any) -> Iterator[Problem]:
    """I7: the rank scheduler is of this model, and its layers have the forms that it gave them."""
    if unwrapped(ranks.model) is not model:
        yield Problem("I7", "ranks", "it changes another model; make a new one of this model")
        return
    if other := [o for o in ranks.optimizer if optimizers and not any(o is k for k in optimizers)]:
        text = f"it changes another {type(other[0]).__name__} than those given; make a new one"
        yield Problem("I7", "ranks", text)
    forms = ranks._readings().forms  # of its last plan, and of what is postponed
    for site, form in differences(model, forms):
        yield Problem(
            "I7",
            site.path,
            f"its rank scheduler gave it {form}, and it is {site.form}: leave changes to the "
            "scheduler, or load its state again",
        )
