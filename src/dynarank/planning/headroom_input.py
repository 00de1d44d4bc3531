"""What a headroom probe is given: batches, loss and optimizer, with their defaults and checks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.forms import RankLike
from dynarank.layers.running import call_model

__all__ = ["check_arguments", "check_loss", "default_loss", "default_optimizer", "own", "split"]

LEAST_STEPS = 10
HELD_OUT = 8  # batches, at most a quarter of those there are


def split(
    loader: Iterable[Any] | Callable[[], Iterable[Any]], steps: int, evaluate: Iterable[Any] | None
) -> tuple[list[Any], list[Any]]:
    """The batches to train on, and those to compare on, which no run trains on."""
    source = loader if isinstance(loader, Iterable) else loader()
    if evaluate is not None:
        train, held_out = list(islice(source, steps)), list(evaluate)
    else:
        every = list(islice(source, steps + HELD_OUT))
        count = min(HELD_OUT, max(1, len(every) // 4))
        apart = {round(i * len(every) / count) for i in range(count)}  # evenly, if they are sorted
        train = [batch for i, batch in enumerate(every) if i not in apart]
        held_out = [every[i] for i in sorted(apart)] if every else []
    if not train or not held_out:
        raise ValueError(
            f"the loader has {len(train)} batches to train on and there are {len(held_out)} to "
            "compare losses on; both must be at least 1. An iterator that has ended has none"
        )
    return train, held_out


def own(batch: Any) -> Any:
    """A copy of a dict, so that a loss that takes the labels out of it can do so again."""
    return copy.copy(cast(Any, batch)) if isinstance(batch, MutableMapping) else batch


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The cross-entropy of ``(inputs, integer targets)``, or the model's own loss of a dict."""
    output = call_model(model, batch)
    if isinstance(batch, Mapping):
        found = getattr(output, "loss", None)
        if isinstance(found, Tensor):
            return found
    elif isinstance(output, Tensor) and isinstance(batch, tuple | list) and len(batch) == 2:
        target = cast(Any, batch[1])
        if isinstance(target, Tensor) and not target.is_floating_point():
            if output.shape[:-1] == target.shape:
                return F.cross_entropy(output.flatten(0, -2), target.flatten())
            return F.cross_entropy(output, target)
    raise ValueError(
        "by default the loss is the cross-entropy of batches (inputs, integer targets), or the "
        "loss of the model's output if batches are dicts; give loss=, a function (model, batch) "
        "-> scalar"
    )


def default_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """AdamW at 1e-3."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def check_loss(value: Any) -> None:
    """Raise unless it is a finite scalar with a gradient."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss(model, batch) must return a scalar tensor, got {shown}")
    if not value.requires_grad:
        raise ValueError("the loss has no gradient: it does not depend on trainable parameters")
    if not math.isfinite(value.item()):
        raise ValueError(f"the loss of the first batch is {value.item()}, before any training")


def check_arguments(make_model: object, ranks: Sequence[RankLike], steps: int, seeds: int) -> None:
    """Raise unless the arguments are those of a probe."""
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise TypeError(
            "make_model is a function that returns a new model, such as lambda: "
            f"copy.deepcopy(model); got {type(make_model).__name__}"
        )
    if not ranks:
        raise ValueError("give at least one rank to probe, got none")
    for name, value, least in (("steps", steps, LEAST_STEPS), ("seeds", seeds, 1)):
        if isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is a whole number >= {least}, got {value!r}")
