"""An optimizer's state by the names of its parameters, instead of their numbers.

torch numbers the parameters of an optimizer by their order in its groups, and loads by number: a
state of the same parameters in another order is loaded into the wrong ones. Here the names count:
before loading, each group gets the members, in the order, that it had when it was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.surgery.own_references import inner_optimizer
from dynarank.surgery.state_layout import SHAPED

__all__ = ["load_named_state", "named_state", "place_parameters"]

_KIND = "class"


def named_state(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """``optimizer.state_dict()`` with names in place of numbers; the tensors are not copied.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> named_state(torch.optim.SGD(model.parameters()), model)["param_groups"][0]["params"]
        ['weight', 'bias']
    """
    state, names = dict(optimizer.state_dict()), _names(optimizer, model)
    of = {
        number: name
        for numbers, row in zip(state["param_groups"], names, strict=True)
        for number, name in zip(numbers["params"], row, strict=True)
    }
    groups = zip(state["param_groups"], names, strict=True)
    state["param_groups"] = [{**group, "params": row} for group, row in groups]
    state["state"] = {of.get(key, key): value for key, value in state["state"].items()}
    return {**state, _KIND: _kind(optimizer)}


def place_parameters(
    optimizer: Any, model: nn.Module, saved: Mapping[str, Any], undo: ExitStack
) -> None:
    """Give each group of the optimizer the members that it had, in their order; check the shapes.

    Raises:
        ValueError: the optimizer is of another class, has other parameters or another number of
            groups, or a tensor of the state does not have its parameter's shape.
    """
    then, now = saved.get(_KIND), _kind(optimizer)
    if then and now and then != now:
        raise ValueError(
            f"the optimizer is of the class {now}, the checkpoint's was of the class {then}; make "
            "the same optimizer as in the saved run, or leave optimizer out"
        )
    wanted = [list(cast(Sequence[str], group["params"])) for group in saved["param_groups"]]
    names, groups = _names(optimizer, model), optimizer.param_groups
    members = [p for group in groups for p in group["params"]]
    own = dict(zip((name for row in names for name in row), members, strict=True))
    if other := sorted(own.keys() ^ {name for row in wanted for name in row}):
        where = "optimizer" if other[0] in own else "checkpoint's optimizer"
        raise ValueError(
            f"only the {where} holds the parameter {other[0]!r} ({len(other)} differ); make the "
            "optimizer of the same parameters as in the saved run"
        )
    if len(groups) != len(wanted):
        raise ValueError(
            f"the optimizer has {len(groups)} parameter groups, the checkpoint's had "
            f"{len(wanted)}; make the same groups as in the saved run"
        )
    for name, entries in _states(saved):
        _check_shapes(name, own.get(name), entries)
    for group, row in zip(groups, wanted, strict=True):
        members = group["params"]  # the very list, in which earlier changes are taken back too
        undo.callback(members.__setitem__, slice(None), list(members))
        members[:] = [own[name] for name in row]


def load_named_state(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Load a state into an optimizer whose parameters have been placed."""
    numbers: dict[str, int] = {}
    for group in saved["param_groups"]:
        numbers |= {name: len(numbers) + i for i, name in enumerate(group["params"])}
    groups = [
        {**g, "params": [numbers[name] for name in g["params"]]} for g in saved["param_groups"]
    ]
    states = {numbers.get(key, key): value for key, value in saved["state"].items()}
    rest = {key: value for key, value in saved.items() if key != _KIND}
    optimizer.load_state_dict({**rest, "state": states, "param_groups": groups})
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items() if isinstance(parameter, Tensor) else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[key] = _laid_out(value, parameter)


def _kind(optimizer: Any) -> str:
    """The class of torch's that the optimizer is at heart; "" for one of somebody else's.

    Example:
        >>> _kind(torch.optim.AdamW([torch.ones(1)]))  # which is an Adam
        'Adam'
    """
    classes = [one for one in type(inner_optimizer(optimizer)).__mro__ if one is not Optimizer]
    of_torch = [one.__name__ for one in classes if one.__module__.startswith("torch.optim.")]
    return of_torch[-1] if of_torch else ""


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """The value with the parameter's strides, as the optimizer made it: a file has none."""
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _names(optimizer: Any, model: nn.Module) -> list[list[str]]:
    """The name of each parameter, by group; one that is not the model's is named by its place."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [
        [known.get(id(p), f"group {i}, parameter {j}") for j, p in enumerate(group["params"])]
        for i, group in enumerate(optimizer.param_groups)
    ]


def _states(saved: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, entries in saved["state"].items():
        if isinstance(name, str) and isinstance(entries, Mapping):
            yield name, cast(Mapping[str, Any], entries)


def _check_shapes(name: str, parameter: Tensor | None, entries: Mapping[str, Any]) -> None:
    """Raise ValueError for a state that cannot be this parameter's: more entries than it has."""
    for key in SHAPED:
        value = entries.get(key)
        if parameter is not None and isinstance(value, Tensor) and value.shape != parameter.shape:
            raise ValueError(
                f"{key} of {name!r} has the shape {tuple(value.shape)} in the checkpoint, the "
                f"parameter has {tuple(parameter.shape)}; load into a model built as it was then"
            )
