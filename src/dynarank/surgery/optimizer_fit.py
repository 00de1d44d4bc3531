"""Whether an optimizer's groups and states are those of the model's parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.decompositions import all_finite
from dynarank.distributed.dtensors import local_part
from dynarank.surgery.own_references import groups_of, wrapped
from dynarank.surgery.problem import Problem, shape

__all__ = [
    "entries_of",
    "group_problems",
    "is_finite",
    "misfit",
    "state_problems",
    "value_problems",
]

# States with an entry for each of the parameter's, in torch's optimizers.
_LIKE_PARAMETER = {
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg",
    "grad_avg", "acc_delta", "prev", "step_size", "ax",
}  # fmt: skip
# Where infinite values mean damage, in buffers: masks hold them on purpose.
_STATISTICS = ("running_mean", "running_var")
_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def group_problems(model: nn.Module, optimizers: Sequence[Any]) -> Iterator[Problem]:
    """I1: each parameter that trains is in exactly one group. I2: no other parameter is in any."""
    families = [wrapped(one) for one in optimizers]
    held = [p for family in families for g in groups_of(family) for p in g["params"]]
    counts, own = Counter(map(id, held)), {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if counts[id(p)] != 1 and (p.requires_grad or counts[id(p)]):
            where = f"is in {counts[id(p)]} groups" if counts[id(p)] else "trains, and is in none"
            yield Problem(
                "I1",
                name,
                f"it {where} of the optimizers given, not in one: pass every optimizer in a list, "
                "leave it to one group, or freeze it",
            )
    foreign = {id(p): p for p in held if id(p) not in own}
    states = {id(p): p for family in families for one in family for p in _keys(one)}
    orphans = {key: p for key, p in states.items() if key not in counts}
    for what, found in (("a group", foreign), ("the state", orphans)):
        for key, p in found.items():
            name = own.get(key) or f"a parameter of shape {shape(p)}"
            yield Problem(
                "I2",
                name,
                f"it is in {what} of an optimizer, and is "
                + ("in no group" if key in own else "not the model's")
                + ": pass the optimizer to the change of form that replaced it, or make a new "
                "optimizer; pass a ModuleList of the modules if it trains several",
            )


def state_problems(model: nn.Module, optimizers: Sequence[Any]) -> Iterator[Problem]:
    """I3: states have the shape, dtype and device of their parameters. I10: they are finite."""
    names = {id(p): name for name, p in model.named_parameters()}
    for one in (one for optimizer in optimizers for one in wrapped(optimizer)):
        for p in _keys(one):
            name, state = names.get(id(p), f"a parameter of shape {shape(p)}"), one.state[p]
            for key, value in entries_of(state):
                if text := misfit(one, state, key, value, p):
                    yield Problem("I3", name, text)
                elif value.ndim > 0 and not is_finite(value):
                    yield Problem(
                        "I10", name, f"its state {key} holds NaN or infinite values: reset the "
                        "optimizer's state of it, del optimizer.state[parameter]"
                    )  # fmt: skip


def misfit(optimizer: Any, state: Mapping[str, Any], key: str, value: Tensor, p: Tensor) -> str:
    """Why an entry of a state cannot be its parameter's; empty if it can.

    Only entries that have the parameter's shape in torch's optimizers are judged, and dtypes only
    of these: others may keep averages in fp32, or (GaLore) in a space of their own.
    """
    if key not in _LIKE_PARAMETER or any(map(_is_object, state.values())):
        return ""
    if value.shape != p.shape:
        said = "the optimizer's state is of another form; pass the optimizer to the change"
        return f"its state {key} has the shape {shape(value)}, it has {shape(p)}: {said}"
    if not any(cls.__module__.startswith("torch.optim.") for cls in type(optimizer).__mro__[:-2]):
        return ""
    wider = type(optimizer).__name__ == "SGD" and _holds(value.dtype, p.dtype)
    if (value.dtype != p.dtype and not wider) or value.device != p.device:
        return (
            f"its state {key} is {value.dtype} on {value.device}, it is {p.dtype} on {p.device}: "
            "optimizer.load_state_dict(optimizer.state_dict()) converts the states"
        )
    return ""


def value_problems(model: nn.Module) -> Iterator[Problem]:
    """I10: weights, gradients and buffers are finite."""
    for name, p in model.named_parameters():
        if not is_finite(p, infinite=not p.requires_grad):
            yield Problem("I10", name, "it holds NaN or infinite values: load an earlier state")
        if p.grad is not None and not is_finite(p.grad):
            yield Problem(
                "I10", name, "its gradient holds NaN or infinite values: skip the step, and call "
                "optimizer.zero_grad()"
            )  # fmt: skip
    for name, buffer in model.named_buffers():
        if not is_finite(buffer, infinite=name.rpartition(".")[2] not in _STATISTICS):
            yield Problem("I10", name, "this buffer holds NaN or infinite values: reset it")


def is_finite(tensor: Tensor, *, infinite: bool = False) -> bool:
    """Whether no entry is NaN or, unless those are allowed, infinite; what has no values is.

    Of a sharded tensor only this process's entries are read.
    """
    tensor = local_part(tensor)
    plain = type(tensor.data) is Tensor and tensor.layout == torch.strided and not tensor.is_meta
    if not plain or tensor.dtype not in _NUMBERS:
        return True
    return all_finite(tensor) or (infinite and not bool(tensor.isnan().any()))


def entries_of(state: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a parameter's state, by key."""
    items: Iterable[Any] = state.items() if isinstance(state, Mapping) else ()
    return [(key, value) for key, value in items if isinstance(value, Tensor)]


def _keys(optimizer: Any) -> list[Tensor]:
    state = optimizer.state if isinstance(optimizer.state, Mapping) else {}
    return [key for key in state if isinstance(key, Tensor)]


def _is_object(value: Any) -> bool:
    return not isinstance(value, Tensor | bool | int | float | str | None | list | tuple | dict)


def _holds(one: torch.dtype, other: torch.dtype) -> bool:
    return torch.promote_types(one, other) == one
