"""A training state copied out of its objects, and put back: structure first, then values.

Legend of the parts: ``model`` and ``optimizer`` are tables of tensors, ``structure`` says of which
forms the weights are, ``state`` holds the rest (schedulers, random states, what the user adds).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynarank.checkpoint.folder import Contents
from dynarank.checkpoint.named_state import load_named_state, named_state, place_parameters
from dynarank.checkpoint.random_states import random_states as read_random_states
from dynarank.checkpoint.random_states import set_random_states
from dynarank.checkpoint.structure import restore_structure, structure_of
from dynarank.checkpoint.tree import flatten, unflatten

__all__ = ["restore", "take"]

_PARTS = ("model", "optimizer", "ema", "gradients", "state", "random", "extra")


def take(
    *,
    model: nn.Module,
    optimizer: Any = None,
    ranks: Any = None,
    lr_scheduler: Any = None,
    ema: Any = None,
    scaler: Any = None,
    extra: Any = None,
    random_states: bool = True,
) -> Contents:
    """Copy a training state: whatever happens to the objects afterwards, the copy stays.

    Arguments and errors are those of :func:`dynarank.save`.
    """
    others = {"ranks": ranks, "lr_scheduler": lr_scheduler, "scaler": scaler}
    parts: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": [named_state(one, model) for one in _all(optimizer)],
        "ema": [one if isinstance(one, Mapping) else one.state_dict() for one in _all(ema)],
        "gradients": _gradients(model),
        "state": {name: [one.state_dict() for one in _all(v)] for name, v in others.items()},
        "random": read_random_states() if random_states else None,
        "extra": extra,
    }
    structure = {"model": structure_of(model), "ema": [_structure_of(one) for one in _all(ema)]}
    data: dict[str, Any] = {"structure": structure}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, part in parts.items():
        data[name], found = flatten(part, name)
        if found:
            tensors[name] = {key: value.to("cpu", copy=True) for key, value in found.items()}
    return Contents(tensors, data)


def restore(
    contents: Contents,
    *,
    model: nn.Module,
    optimizer: Any = None,
    ranks: Any = None,
    lr_scheduler: Any = None,
    ema: Any = None,
    scaler: Any = None,
    random_states: bool = True,
) -> Any:
    """Put a copied state back into a model and its companions; returns what was given as extra.

    Arguments and errors are those of :func:`dynarank.load`.
    """
    parts = {name: _part(contents, name) for name in _PARTS}
    saved = {**parts["state"], "optimizer": parts["optimizer"], "ema": parts["ema"]}
    given = {"optimizer": optimizer, "ranks": ranks, "lr_scheduler": lr_scheduler}
    pairs = {
        name: _pairs(name, one, saved[name])
        for name, one in {**given, "ema": ema, "scaler": scaler}.items()
    }
    structure = contents.data["structure"]
    averages = list(zip((one for one, _ in pairs["ema"]), structure["ema"], strict=False))
    with ExitStack() as undo:
        for one, state in pairs["ranks"]:
            one.load_state_dict(state)
        restore_structure(model, structure["model"], _all(optimizer), undo)
        for one, known in averages:
            if known is not None:
                restore_structure(one, known, (), undo)
        for one, state in pairs["optimizer"]:
            place_parameters(one, model, state, undo)
        undo.pop_all()
    model.load_state_dict(parts["model"])
    _set_gradients(model, parts["gradients"])
    for one, state in pairs["optimizer"]:
        load_named_state(one, state)
    for one, state in (*pairs["lr_scheduler"], *pairs["scaler"], *pairs["ema"]):
        _load(one, state)
    if random_states and parts["random"] is not None:
        set_random_states(parts["random"])
    return parts["extra"]


def _all(value: Any) -> list[Any]:
    """The objects of one kind: several may be given, as a list or tuple."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _pairs(name: str, given: Any, saved: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Each given object with its saved state."""
    objects = _all(given)
    if objects and len(objects) != len(saved):
        raise ValueError(
            f"{name}=: {len(objects)} given, the checkpoint holds the state of {len(saved)}; give "
            f"what was given to save{'' if saved else ', or leave ' + name + ' out'}"
        )
    return list(zip(objects, saved, strict=False))


def _part(contents: Contents, name: str) -> Any:
    return unflatten(contents.data[name], contents.tensors.get(name, {}), name)


def _structure_of(average: Any) -> dict[str, Any] | None:
    return structure_of(average) if isinstance(average, nn.Module) else None


def _load(one: Any, state: Any) -> None:
    if isinstance(one, MutableMapping):
        cast(MutableMapping[Any, Any], one).update(state)
    else:
        one.load_state_dict(state)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of an unfinished accumulation: none if all of them are zero."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found if any(bool(grad.any()) for grad in found.values()) else {}


@torch.no_grad()
def _set_gradients(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        grad = saved.get(name)
        p.grad = None if grad is None else torch.empty_like(p, dtype=grad.dtype).copy_(grad)
