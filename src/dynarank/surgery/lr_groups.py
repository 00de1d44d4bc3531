"""Whether an LR scheduler drives the optimizer's groups as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dynarank.surgery.own_references import wrapped
from dynarank.surgery.problem import Problem

__all__ = ["lr_problems"]

# What LR schedulers of torch keep for each group, as lists of their own and as keys of the group.
_LISTS = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
_KEYS = {"OneCycleLR": ("max_lr", "min_lr"), "SWALR": ("swa_lr",)}


def lr_problems(lr_scheduler: Any, optimizers: Sequence[Any]) -> Iterator[Problem]:
    """I4: it belongs to one of the optimizers, and has a rate for each of its groups.

    Args:
        lr_scheduler: one, several in a list, or one that contains others (``ChainedScheduler``,
            ``SequentialLR``, accelerate's).
        optimizers: those given; none: only the number of groups is checked.
    """
    name = type(lr_scheduler).__name__
    if isinstance(lr_scheduler, Sequence):
        parts = [one for one in lr_scheduler if not isinstance(one, int | float)]
    else:
        parts = getattr(lr_scheduler, "_schedulers", None) or _inner(lr_scheduler)
    for one in parts:
        yield from lr_problems(one, optimizers)
    if (own := getattr(lr_scheduler, "optimizer", None)) is None:
        return
    known = {id(one) for optimizer in optimizers for one in wrapped(optimizer)}
    if known and not any(id(one) in known for one in wrapped(own)):
        yield Problem(
            "I4",
            name,
            f"it drives another {type(own).__name__} than the optimizers given, whose rates would "
            "stay as they are: make a new one of the optimizer that takes the steps",
        )
        return
    groups, kept = own.param_groups, vars(lr_scheduler)
    for key in (key for key in _LISTS if isinstance(kept.get(key), list)):
        if len(kept[key]) != len(groups):
            yield Problem(
                "I4",
                name,
                f"it has {len(kept[key])} {key}, its optimizer {len(groups)} groups: add groups "
                "before the LR scheduler is made, or make a new one",
            )
    keys = [key for cls in type(lr_scheduler).__mro__ for key in _KEYS.get(cls.__name__, ())]
    for key in [*(["initial_lr"] if "base_lrs" in kept else []), *keys]:
        if without := [i for i, group in enumerate(groups) if key not in group]:
            yield Problem(
                "I4",
                name,
                f"group {without[0]} of its optimizer has no {key!r}, which it reads: set it, or "
                "make a new LR scheduler",
            )


def _inner(lr_scheduler: Any) -> list[Any]:
    one = getattr(lr_scheduler, "scheduler", None)
    return [] if one is None else [one]
