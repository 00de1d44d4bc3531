"""The effective weight as a layer hands it out: a tensor, and what is written to it is not lost.

``layer.weight`` of a layer with factors is computed when it is read, so a write to it would have no
effect. Here every operation on it, and on its views, is followed by a look at the tensor's version
counter: if it has moved, the layer gets the value, or raises. So ``nn.init``, ``layer.weight.mul_``
and ``layer.weight.data += update`` act as they do on a Parameter.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from dynarank.layers.weight import ResolvedWeight

__all__ = ["EffectiveWeight", "hand_out", "is_written"]

_INIT = ("torch.nn.init", "torch.nn.modules.")  # where layers are initialized
# In-place operations whose result does not depend on the values before.
_REPLACING = {
    "bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_",
    "normal_", "random_", "uniform_", "zero_",
}  # fmt: skip
_UNCOUNTED = {Tensor.apply_, Tensor.map_, Tensor.map2_}  # torch does not count what they write
_WORTH_SAYING = 0.01  # relative error of a given value


class Reading:
    """One reading of a weight: its tensor, which all views share, and the layer it came from."""

    def __init__(self, layer: nn.Module, weight: ResolvedWeight, whole: Tensor) -> None:
        self.layer, self.weight, self.whole = layer, weight, whole
        self.name = weight.spec.name
        self._version, self._in_graph = whole._version, whole.requires_grad
        self._replaced = False
        self._read_from = self._state()

    @property
    def is_current(self) -> bool:
        """Whether the layer's weight is the one that was read, or written through this reading."""
        return self._state() == self._read_from

    def parameters(self) -> dict[str, Parameter]:
        """The parameters that the weight is computed from."""
        own = self.layer._parameters  # pyright: ignore[reportPrivateUsage]
        return {name: p for name in self.weight.names if (p := own.get(name)) is not None}

    def shares(self, tensor: Tensor) -> bool:
        """Whether the tensor is the weight or a view of it."""
        mine, its = (cast(Any, t.untyped_storage()) for t in (self.whole, tensor))
        return bool(mine._cdata == its._cdata)

    @property
    def is_written(self) -> bool:
        """Whether the tensor has been written to since the layer last had its value."""
        return self.whole._version != self._version

    @torch.no_grad()
    def pass_on(self, write: _Write) -> None:
        """Give the layer what has been written.

        Raises:
            RuntimeError: autograd has recorded the write, or the layer has changed meanwhile.
            ValueError: a change of a low-rank weight does not fit its rank.
        """
        self._version = self.whole._version
        if write.recorded or self.whole.requires_grad != self._in_graph:
            raise RuntimeError(
                f"{self.name} of a layer with factors was changed in place while autograd records: "
                "write under torch.no_grad(), or compute with a copy (layer.weight.clone()); "
                "the layer is as it was"
            )
        if any(p.dtype is not self.whole.dtype for p in self.parameters().values()):
            raise RuntimeError(
                f"{self.name} was read under autocast, in {self.whole.dtype}, and the layer has "
                "another precision: write to it outside of autocast; the layer is as it was"
            )
        if not self.is_current:
            raise RuntimeError(
                f"{self.name} was read before the layer's parameters changed, and is out of date: "
                "read it again before writing to it; the layer is as it was"
            )
        self._replaced |= write.replaces
        value = self.whole.detach()
        lost = self.weight.write_(self.parameters(), value, fit=not self._replaced)
        self._read_from = self._state()
        if lost > _WORTH_SAYING and write.copies:
            warnings.warn(
                f"{self.name} has the form {self.weight.form}: the values copied to it were "
                f"truncated, with a relative error of {lost:.2g}; call inflate(model) first to "
                "keep them",
                stacklevel=4,
            )

    def _state(self) -> tuple[object, ...]:
        """What the layer computes the weight from, and how often that has been written to."""
        found = self.parameters().values()
        return tuple((id(p), 0 if p.is_inference() else p._version) for p in found)


@dataclass(frozen=True)
class _Write:
    """What is known of an operation that has written to a weight.

    Args:
        replaces: whether nothing of the old values is meant to stay.
        copies: whether the new values were given by the user.
        recorded: whether autograd has recorded it.
    """

    replaces: bool = False
    copies: bool = False
    recorded: bool = False

    @classmethod
    def of(cls, function: Any, weight: EffectiveWeight, caller: str, records: bool) -> _Write:
        """By the operation, called on ``weight`` from the module ``caller``."""
        name, home = getattr(function, "__name__", ""), getattr(function, "__module__", "") or ""
        init = home.startswith(_INIT) or caller.startswith(_INIT)
        whole = weight.plain.numel() == weight.reading.whole.numel()
        return cls(
            replaces=init or (whole and name in _REPLACING),
            copies=name == "copy_" and not init,
            recorded=records and not home.startswith(_INIT),  # those functions record nothing
        )


class EffectiveWeight(Tensor):
    """A tensor that a layer has computed from its parameters, or a view of it."""

    __slots__ = ("plain", "reading")  # which torch.utils.swap_tensors refuses
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

    def __getattr__(self, name: str) -> Any:
        """An attribute that a user, or a library, has given to all of the layer's parameters.

        transformers notes there which parameters are not to be initialized again.
        """
        found = () if name in EffectiveWeight.__slots__ else self.reading.parameters().values()
        values = [vars(parameter)[name] for parameter in found if name in vars(parameter)]
        if not values or len(values) < len(found) or any(one is not values[0] for one in values):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return values[0]

    def set_(self, *_: object, **__: object) -> Any:
        """Refuse; torch ignores what ``__torch_function__`` says of this operation."""
        raise RuntimeError(
            f"{self.reading.name} is computed from factors and has no storage to replace: copy the "
            "values (copy_ under torch.no_grad()), or call inflate(model) first"
        )

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
        weights: list[EffectiveWeight] = []
        args, named = _plain(args, weights), cast(dict[str, Any], _plain(kwargs, weights))
        records = torch.is_grad_enabled() and any(w.plain.requires_grad for w in weights)
        result = func(*args, **named)
        if func in _UNCOUNTED and args[0] is weights[0].plain:
            increment_version(args[0])
        for w in weights:
            if w.reading.is_written:
                caller = cast(Any, sys)._getframe(1).f_globals.get("__name__", "")
                w.reading.pass_on(_Write.of(func, w, caller, records))
        if hasattr(result, "setflags"):  # a NumPy array: nobody sees what is written to it
            result.setflags(write=False)
        if type(result) in (list, tuple):
            return type(result)(_tracked(one, weights) for one in result)
        return _tracked(result, weights)


def hand_out(layer: nn.Module, weight: ResolvedWeight, value: Tensor) -> Tensor:
    """The value of a layer's weight such that what is written to it reaches the layer.

    Values of other kinds (fake, sharded, inside a transform of torch.func) are left as they are:
    there is nothing to write to.
    """
    if not _is_plain(value):
        return value
    value = value.contiguous()  # as a parameter is, so that it is filled in the same order
    return EffectiveWeight.of(Reading(layer, weight, value), value)


def is_written(value: object, layer: nn.Module, name: str) -> bool:
    """Whether the value is this weight's own, just read or written."""
    if not isinstance(value, EffectiveWeight) or not value.is_whole:
        return False
    reading = value.reading
    return reading.layer is layer and reading.name == name and reading.is_current


def _is_plain(tensor: object) -> bool:
    wrapped = cast(Any, torch)._C._functorch.is_functorch_wrapped_tensor
    return type(tensor) is Tensor and not wrapped(tensor)


def _plain(value: Any, found: list[EffectiveWeight]) -> Any:
    """The value with a plain tensor for each weight in it; the weights are added to ``found``."""
    if isinstance(value, EffectiveWeight):
        found.append(value)
        return value.plain
    if type(value) in (list, tuple):
        return type(value)([_plain(one, found) for one in value])
    if type(value) is dict:
        return {key: _plain(one, found) for key, one in value.items()}
    return value


def _tracked(result: Any, weights: list[EffectiveWeight]) -> Any:
    """The weight itself, for its plain tensor; a view of a weight, as one; any other as it is."""
    if not _is_plain(result) or result.layout is not torch.strided:
        return result
    for weight in weights:
        if result is weight.plain:
            return weight
        if weight.reading.shares(result):
            return EffectiveWeight.of(weight.reading, result)
    return result


def _data(weight: EffectiveWeight) -> Tensor:
    """``.data``: as ``detach()``, which has the version counter of the weight."""
    return weight.detach()


@torch.no_grad()
def _set_data(weight: EffectiveWeight, value: Tensor) -> None:
    if isinstance(value, EffectiveWeight):
        value = value.plain
    mine, its = ((t.shape, t.dtype, t.device) for t in (weight.plain, value))
    if not weight.is_whole or mine != its:
        raise ValueError(
            f"{weight.reading.name} is {_described(*mine)} in this layer, got {_described(*its)}; "
            "the layer is as it was. While it has factors nothing of that can change: call "
            "inflate(model) or merge(model) first, for example to resize embeddings"
        )
    written = value.data_ptr() == weight.plain.data_ptr() and value.stride() == weight.stride()
    if not (written and weight.reading.is_current):  # as it is after `layer.weight.data += ...`
        weight.plain.copy_(value.clone())
        weight.reading.pass_on(_Write())


def _described(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{tuple(shape)} in {dtype} on {device}"


def _set_requires_grad(weight: EffectiveWeight, requires_grad: bool = True) -> Any:
    if not weight.is_whole:
        return NotImplemented
    for name, parameter in weight.reading.parameters().items():
        if not weight.reading.weight.spec.is_base(name):
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
