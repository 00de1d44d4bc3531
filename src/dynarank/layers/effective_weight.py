"""The effective weight as a layer hands it out: it reads as a tensor, and a write reaches the layer.

``layer.weight`` of a layer with factors is computed when it is read, so a write to that tensor would
be lost. Here every operation on it, and on its views, is followed by a look at the tensor's version
counter: if it has moved, the layer gets the value, or raises. So ``nn.init``, ``layer.weight.mul_``
and ``layer.weight.data += update`` act as they do on a Parameter.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map_only

from dynarank.layers.weight import ResolvedWeight

__all__ = ["EffectiveWeight", "hand_out", "is_written"]

_INIT = ("torch.nn.init", "torch.nn.modules.")  # where layers are initialized
# In-place operations whose result does not depend on the values before.
_REPLACING = {
    "bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_",
    "normal_", "random_", "uniform_", "zero_",
}  # fmt: skip
_WORTH_SAYING = 0.01  # relative error of a given value


class Owner(Protocol):
    """A layer that hands out its effective weights."""

    _parameters: dict[str, Parameter | None]

    def resolved(self, name: str) -> ResolvedWeight:
        """The weight of this name in its form."""
        ...


class Reading:
    """One reading of a weight: its tensor, which all views share, and the layer it came from."""

    def __init__(self, owner: Owner, name: str, whole: Tensor) -> None:
        self.owner, self.name, self.whole = owner, name, whole
        self._version, self._in_graph = whole._version, whole.requires_grad
        self._replaced = False
        self._read_from = self._state()

    @property
    def is_current(self) -> bool:
        """Whether the layer's weight is the one that was read, or written through this reading."""
        return self._state() == self._read_from

    def parameters(self) -> dict[str, Parameter]:
        """The parameters that the weight is computed from."""
        names, own = self.owner.resolved(self.name).names, self.owner._parameters
        return {name: cast(Parameter, own[name]) for name in names}

    def shares(self, tensor: Tensor) -> bool:
        """Whether the tensor is the weight or a view of it."""
        mine, its = self.whole.untyped_storage(), tensor.untyped_storage()
        return mine._cdata == its._cdata

    @torch.no_grad()
    def written(self, function: str, whole: bool, init: bool, graph: bool = False) -> None:
        """Pass on what an operation has written, if it has.

        Args:
            function: the operation's name.
            whole: whether it was called on the whole weight.
            init: whether it is part of an initialization by ``torch.nn.init``.
            graph: whether autograd has recorded it.

        Raises:
            RuntimeError: autograd has recorded the write, or the layer has changed meanwhile.
            ValueError: a change of a low-rank weight does not fit its rank.
        """
        if self.whole._version == self._version:
            return
        self._version = self.whole._version
        if graph or self.whole.requires_grad != self._in_graph:
            raise RuntimeError(
                f"{self.name} of a layer with factors was changed in place while autograd records: "
                "write under torch.no_grad(), or compute with a copy (layer.weight.clone()); "
                "the layer is as it was"
            )
        if not self.is_current:
            raise RuntimeError(
                f"{self.name} was read before the layer's parameters changed, and is out of date: "
                "read it again before writing to it; the layer is as it was"
            )
        self._replaced |= init or (whole and function in _REPLACING)
        weight = self.owner.resolved(self.name)
        lost = weight.write_(self.parameters(), self.whole.detach(), fit=not self._replaced)
        self._read_from = self._state()
        if lost > _WORTH_SAYING and function == "copy_" and not init:
            warnings.warn(
                f"{self.name} has the form {weight.form} and was truncated: it holds the values "
                f"copied to it up to a relative error of {lost:.2g}. Call inflate(model) first to "
                "keep them",
                stacklevel=4,
            )

    def _state(self) -> tuple[object, ...]:
        found = [(p, 0 if p.is_inference() else p._version) for p in self.parameters().values()]
        return self.owner.resolved(self.name), *((id(p), version) for p, version in found)


class EffectiveWeight(Tensor):
    """A tensor that a layer has computed from its parameters, or a view of it."""

    reading: Reading
    plain: Tensor

    @classmethod
    def of(cls, reading: Reading, plain: Tensor) -> EffectiveWeight:
        """``plain`` is the whole weight or a view of it."""
        weight = plain.as_subclass(cls)
        weight.reading, weight.plain = reading, plain
        return weight

    @property
    def is_whole(self) -> bool:
        """Whether it is what the layer handed out, not a view of it."""
        return self.plain is self.reading.whole

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation on plain tensors, then pass on what it has written."""
        kwargs = kwargs or {}
        if func in _ON_THE_WEIGHT and isinstance(args[0], cls):
            handled = _ON_THE_WEIGHT[func](*args, **kwargs)
            if handled is not NotImplemented:
                return handled
        weights = [w for w in tree_leaves((args, kwargs)) if isinstance(w, cls)]
        args, kwargs = tree_map_only(cls, _plain, (args, kwargs))
        records = torch.is_grad_enabled() and any(w.plain.requires_grad for w in weights)
        result = func(*args, **kwargs)
        name, caller = getattr(func, "__name__", ""), sys._getframe(1).f_globals.get("__name__", "")
        home = getattr(func, "__module__", None) or ""
        init = home.startswith(_INIT) or caller.startswith(_INIT)
        graph = records and not home.startswith(_INIT)  # those functions record nothing
        for w in weights:
            whole = w.plain.numel() == w.reading.whole.numel()
            w.reading.written(name, whole, init, graph)
        if isinstance(result, Tensor | list | tuple):
            return tree_map_only(Tensor, lambda tensor: _tracked(tensor, weights), result)
        if hasattr(result, "setflags"):  # a NumPy array: nobody sees what is written to it
            result.setflags(write=False)
        return result


def hand_out(owner: Owner, name: str, value: Tensor) -> Tensor:
    """The value such that what is written to it reaches the owner.

    Values of other kinds (fake, sharded, inside a transform of torch.func) are left as they are:
    there is nothing to write to.
    """
    if not _is_plain(value):
        return value
    value = value.contiguous()  # as a parameter is, so that it is filled in the same order
    return EffectiveWeight.of(Reading(owner, name, value), value)


def is_written(value: object, owner: Owner, name: str) -> bool:
    """Whether the value is this weight's own, just read or written."""
    if not isinstance(value, EffectiveWeight) or not value.is_whole:
        return False
    reading = value.reading
    return reading.owner is owner and reading.name == name and reading.is_current


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _plain(weight: EffectiveWeight) -> Tensor:
    return weight.plain


def _tracked(tensor: Tensor, weights: list[EffectiveWeight]) -> Tensor:
    """The weight itself, for its plain tensor; a view of a weight, as one; any other as it is."""
    if not _is_plain(tensor) or tensor.layout is not torch.strided:
        return tensor
    for weight in weights:
        if tensor is weight.plain:
            return weight
        if weight.reading.shares(tensor):
            return EffectiveWeight.of(weight.reading, tensor)
    return tensor


def _data(weight: EffectiveWeight) -> Tensor:
    """``.data``: as ``detach()``, which has the version counter of the weight."""
    return weight.detach()


@torch.no_grad()
def _set_data(weight: EffectiveWeight, value: Tensor) -> None:
    if isinstance(value, EffectiveWeight) and value.reading is weight.reading:
        value = value.plain
    if not weight.is_whole or value.shape != weight.plain.shape:
        raise ValueError(
            f"{weight.reading.name} is {tuple(weight.plain.shape)} in this layer, got "
            f"{tuple(value.shape)}; the layer is as it was"
        )
    if not (weight.reading.shares(value) and weight.reading.is_current):
        weight.plain.copy_(value)
        weight.reading.written("data", True, False)


def _set_requires_grad(weight: EffectiveWeight, requires_grad: bool = True) -> Any:
    if not weight.is_whole:
        return NotImplemented
    is_base = weight.reading.owner.resolved(weight.reading.name).spec.is_base
    for name, parameter in weight.reading.parameters().items():
        if not is_base(name):
            parameter.requires_grad_(requires_grad)
    return weight


def _refuse_hook(weight: EffectiveWeight, *_: object, **__: object) -> Any:
    if not weight.is_whole:
        return NotImplemented
    raise RuntimeError(
        f"{weight.reading.name} is computed from factors, each time it is read: a hook on it would "
        "not see training. Register it on the factors (layer.named_parameters()), or call "
        "inflate(model) first"
    )


def _set_grad(weight: EffectiveWeight, grad: Tensor | None) -> Any:
    return NotImplemented if grad is None or not weight.is_whole else _refuse_hook(weight)


_attribute = cast(Any, Tensor)
_ON_THE_WEIGHT: dict[Any, Callable[..., Any]] = {
    _attribute.data.__get__: _data,
    _attribute.data.__set__: _set_data,
    _attribute.requires_grad.__set__: _set_requires_grad,
    Tensor.requires_grad_: _set_requires_grad,
    Tensor.register_hook: _refuse_hook,
    Tensor.register_post_accumulate_grad_hook: _refuse_hook,
    _attribute.grad.__set__: _set_grad,
}
