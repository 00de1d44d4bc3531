"""A training state copied out of its objects, and put back: structure first, then values.

Legend of the parts: ``model`` and ``optimizer`` are tables of tensors, ``structure`` says of which
forms the weights are, ``state`` holds the rest (schedulers, random states, what the user adds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dynarank.checkpoint.folder import Contents
from dynarank.checkpoint.named_state import load_named_state, named_state, place_parameters
from dynarank.checkpoint.random_states import random_states as read_random_states
from dynarank.checkpoint.random_states import set_random_states
from dynarank.checkpoint.structure import restore_structure, structure_of
from dynarank.checkpoint.tree import flatten, unflatten
from dynarank.checkpoint.values import keep_optimizer, load_modules, load_other
from dynarank.layers import RankedLayer
from dynarank.surgery.loading import follow_loads
from dynarank.surgery.optimizer_signature import sign_states

__all__ = ["restore", "take"]

_Pairs: TypeAlias = list[tuple[Any, Any]]  # objects, and their saved states
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
    model = _uncompiled(model)
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
    model = _uncompiled(model)
    parts = {name: _part(contents, name) for name in _PARTS}
    saved = {**parts["state"], "optimizer": parts["optimizer"], "ema": parts["ema"]}
    given = {"optimizer": optimizer, "ranks": ranks, "lr_scheduler": lr_scheduler}
    pairs = {
        name: _pairs(name, one, saved[name])
        for name, one in {**given, "ema": ema, "scaler": scaler}.items()
    }
    structure = contents.data["structure"]
    modules = [((model, parts["model"]), structure["model"])]
    averages = zip(pairs["ema"], structure["ema"], strict=False)
    modules += [(pair, known) for pair, known in averages if isinstance(pair[0], nn.Module)]
    pairs["ema"] = [pair for pair in pairs["ema"] if not isinstance(pair[0], nn.Module)]
    with ExitStack() as undo:
        undo.callback(set_random_states, read_random_states())
        for one, state in pairs["ranks"]:
            one.load_state_dict(state, undo=undo)
        for (one, _), known in modules:
            if known is not None:
                restore_structure(one, known, _all(optimizer) if one is model else (), undo)
        _load_values(model, pairs, [pair for pair, _ in modules], undo)
        _set_gradients(model, parts["gradients"])
        if random_states and parts["random"] is not None:
            set_random_states(parts["random"])
        undo.pop_all()
    _follow([one for (one, _), _ in modules], optimizer)
    return parts["extra"]


def _load_values(
    model: nn.Module, pairs: Mapping[str, _Pairs], modules: _Pairs, undo: ExitStack
) -> None:
    """Load the states of everything whose structure has been restored."""
    for one, state in pairs["optimizer"]:
        place_parameters(one, model, state, undo)
        keep_optimizer(one, undo)
        load_named_state(one, state)
    for name in ("lr_scheduler", "scaler", "ema"):
        for one, state in pairs[name]:
            load_other(name, one, state, undo)
    load_modules(modules, undo)


def _follow(models: Sequence[nn.Module], optimizer: Any) -> None:
    """From now on ranked models take states of other forms, and optimizers sign theirs."""
    for one in models:
        if any(isinstance(module, RankedLayer) for module in one.modules()):
            follow_loads(one)
            sign_states(one, _all(optimizer) if one is models[0] else ())


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` was given: its names have no prefix."""
    return getattr(model, "_orig_mod", model)


def _all(value: Any) -> list[Any]:
    """The objects of one kind: several may be given, as a list or tuple."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _pairs(name: str, given: Any, saved: Sequence[Any]) -> _Pairs:
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


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of an unfinished accumulation: none if all of them are zero."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found if any(bool(grad.any()) for grad in found.values()) else {}


@torch.no_grad()
def _set_gradients(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        grad = saved.get(name)
        p.grad = None if grad is None else torch.empty_like(p, dtype=grad.dtype).copy_(grad)
