"""One layer's change of form, prepared beside the model and then committed or undone.

Preparing computes the new parameters and verifies them; it touches nothing. Committing only moves
references, so it cannot fail half-way, and undoing moves them back.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.decompositions import UnfitWeightError, get_decomposition, precise
from dynarank.forms import Adapted, Change, Form, FullRank, LowRank
from dynarank.layers import (
    RANKED,
    RankedLayer,
    effective_weight,
    own_parameters,
    parameter_names,
)

__all__ = ["LOSSLESS", "Edit", "prepare_edit", "retype_plain"]

# The largest relative weight error of a change that keeps the function: rounding to the dtype once.
LOSSLESS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Edit:
    """A prepared change of one layer: the parameters of its weight before and after."""

    path: str
    layer: nn.Module
    before: Form
    after: Form
    old: dict[str, Parameter]
    new: dict[str, Parameter]
    error: float
    _undo: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def change(self) -> Change:
        """What is reported of it."""
        return Change(self.path, self.before, self.after, self.error)

    def commit(self) -> None:
        """Give the layer its new class, parameters and form."""
        layer, parameters = self.layer, own_parameters(self.layer)
        self._undo = {"class": type(layer), "dict": dict(layer.__dict__), "all": dict(parameters)}
        others = {name: p for name, p in parameters.items() if name not in self.old}
        parameters.clear()
        parameters.update(self.new)
        parameters.update(others)
        layer.__class__ = layer.__class__ if isinstance(layer, RankedLayer) else RANKED[type(layer)]
        layer.__dict__["form"] = self.after
        home = self.after if isinstance(self.after, LowRank | Adapted) else self.before
        layer.__dict__["home"] = None if isinstance(home, FullRank) else home

    def undo(self) -> None:
        """Take back ``commit``; nothing if it was not called."""
        if not self._undo:
            return
        self.layer.__class__ = self._undo["class"]
        own_parameters(self.layer).clear()
        own_parameters(self.layer).update(self._undo["all"])
        for name in ("form", "home"):
            self.layer.__dict__.pop(name, None)
            if name in self._undo["dict"]:
                self.layer.__dict__[name] = self._undo["dict"][name]


def prepare_edit(path: str, layer: nn.Module, before: Form, after: Form) -> Edit:
    """Compute and verify ``layer``'s parameters in the form ``after``.

    Raises:
        ValueError: the weight is on the meta device or not real floating point.
        UnfitWeightError: it is not finite, its decomposition fails, or a change that must keep the
            function would not.
    """
    own = own_parameters(layer)
    old = {name: own[name] for name in parameter_names(before)}
    old = {name: p for name, p in old.items() if p is not None}
    _check_values(path, old)
    weight = _effective(before, old)
    trains = any(p.requires_grad for name, p in old.items() if name != "base")
    tensors = _tensors(path, weight, before, after, old)
    like = next(iter(old.values()))
    new = {
        name: Parameter(_like(tensor, like, old), requires_grad=trains and name != "base")
        for name, tensor in tensors.items()
    }
    error = _relative_error(weight, _effective(after, new))
    tolerance = math.inf if isinstance(after, LowRank) else LOSSLESS.get(like.dtype, 1e-2)
    if not error <= tolerance:
        raise UnfitWeightError(
            f"layer {path!r}: {before} -> {after} would change the weight by {error:.1e} relative, "
            f"above {tolerance:.0e} for {like.dtype}; the layer is left as it was"
        )
    return Edit(path, layer, before, after, old, new, error)


def retype_plain(layer: RankedLayer) -> None:
    """Make a full-rank ranked layer the plain module it came from."""
    assert isinstance(layer.form, FullRank)
    layer.__class__ = layer.plain  # type: ignore[assignment]
    del layer.__dict__["form"], layer.__dict__["home"]


def _tensors(
    path: str, weight: Tensor, before: Form, after: Form, old: dict[str, Parameter]
) -> dict[str, Tensor]:
    """The new parameters' values by name, in ``parameter_names`` order."""
    same = isinstance(before, FullRank)  # the base is then the old weight's own memory
    dtype = next(iter(old.values())).dtype
    if isinstance(after, FullRank):
        return {"weight": weight}
    decomposition = get_decomposition(after.decomposition)
    rank = int(after.rank)  # type: ignore[arg-type]
    if isinstance(after, LowRank):
        factors = decomposition.split(weight.to(dtype), rank)
    else:
        factors = _zero_adaptor(path, decomposition.shapes(weight.shape, rank))
    base = (
        {"base": old["weight"].detach() if same else weight} if isinstance(after, Adapted) else {}
    )
    return base | dict(zip(decomposition.factor_names, factors, strict=True))


def _zero_adaptor(path: str, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """Glorot-uniform factors, the last one zero, so that their join is zero.

    Drawn from a generator of their own, seeded by the run's seed and the layer's path: the global
    random state is untouched, and two layers differ.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(path.encode()))
    drawn = [_glorot(shape, generator) for shape in shapes[:-1]]
    return (*drawn, torch.zeros(shapes[-1], dtype=torch.float64))


def _glorot(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    positions = math.prod(shape[2:])
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * positions))
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * bound


def _effective(form: Form, parameters: dict[str, Parameter]) -> Tensor:
    """The weight that the parameters stand for, in fp64."""
    return effective_weight(form, {name: precise(p) for name, p in parameters.items()})


def _check_values(path: str, parameters: dict[str, Parameter]) -> None:
    for name, p in parameters.items():
        if p.is_meta:
            raise ValueError(f"layer {path!r}: its {name} is on the meta device and has no values")
        if _has_hooks(p):
            raise ValueError(
                f"layer {path!r}: its {name} has gradient hooks, which would be lost with it; "
                "remove them first and register them on the new parameters"
            )
        if not p.is_floating_point():
            raise ValueError(f"layer {path!r}: its {name} is {p.dtype}; real floating point only")
        if not torch.isfinite(p).all():
            raise UnfitWeightError(f"layer {path!r}: its {name} holds NaN or infinite values")


def _has_hooks(parameter: Parameter) -> bool:
    """Whether hooks wait for the parameter's gradient."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(parameter, name, None) for name in names)


def _relative_error(before: Tensor, after: Tensor) -> float:
    norm = before.norm().item()
    difference = (after - before).norm().item()
    return difference / norm if norm > 0 else difference


def _like(tensor: Tensor, like: Tensor, old: dict[str, Parameter]) -> Tensor:
    """The tensor in the dtype, on the device and in the memory format of the old parameters."""
    tensor = tensor.detach().to(like.device, like.dtype)
    four = tensor.ndim == 4 and any(_channels_last(p) for p in old.values())
    return tensor.contiguous(memory_format=torch.channels_last if four else torch.contiguous_format)


def _channels_last(parameter: Tensor) -> bool:
    last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return last and not parameter.is_contiguous()
