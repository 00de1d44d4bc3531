"""The registry of ranked layer classes: the built-in ones, imported lazily, and your own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from dynarank.distributed.unit_class import beneath
from dynarank.layers.ranked import RankedLayer
from dynarank.layers.subclasses import derived_class, overridden

__all__ = ["class_obstacle", "ranked_class", "readers", "register_layer"]

_TORCH, _CONVOLUTIONS = "torch.nn.modules", ("Conv", "ConvTranspose")
# Plain class -> module of dynarank.layers, ranked class. By name, so that nothing is imported.
_BUILT_IN = {
    f"{_TORCH}.linear.Linear": ("linear", "RankedLinear"),
    f"{_TORCH}.linear.NonDynamicallyQuantizableLinear": ("linear", "RankedOutputProjection"),
    **{
        f"{_TORCH}.conv.{kind}{dims}d": ("conv", f"Ranked{kind}{dims}d")
        for kind in _CONVOLUTIONS
        for dims in (1, 2, 3)
    },
    f"{_TORCH}.sparse.Embedding": ("embedding", "RankedEmbedding"),
    f"{_TORCH}.activation.MultiheadAttention": ("attention", "RankedMultiheadAttention"),
    **{
        f"{_TORCH}.rnn.{kind}": ("recurrent.modules", f"Ranked{kind}")
        for kind in ("LSTM", "GRU", "RNN")
    },
    **{
        f"{_TORCH}.rnn.{kind}Cell": ("recurrent.cells", f"Ranked{kind}Cell")
        for kind in ("LSTM", "GRU", "RNN")
    },
    "transformers.pytorch_utils.Conv1D": ("hf_conv1d", "RankedConv1D"),
}
_RANKED: dict[type[nn.Module], type[RankedLayer]] = {}


def register_layer(plain: type[nn.Module], ranked: type[RankedLayer]) -> None:
    """Register the ranked class of a module class, so that its modules can change form.

    Args:
        plain: the class of the modules. Its subclasses are included, unless they override what a
            forward pass uses or are registered themselves.
        ranked: a class that derives from :class:`RankedLayer` and ``plain``, in this order, has
            ``plain`` as an attribute, and defines ``specs``, which lists its weights.

    Raises:
        ValueError: the classes do not fit, or ``plain`` has a ranked class already.

    Example:
        >>> from dynarank.layers.linear import RankedLinear
        >>> dr.layers.register_layer(nn.Linear, RankedLinear)
        Traceback (most recent call last):
        ...
        ValueError: Linear has a ranked class already, RankedLinear: a second one would not be used
    """
    if reason := _unfit(plain, ranked):
        raise ValueError(reason)
    if known := _registered(plain):
        raise ValueError(
            f"{plain.__name__} has a ranked class already, {known.__name__}: "
            "a second one would not be used"
        )
    _RANKED[plain] = ranked


def _unfit(plain: Any, ranked: Any) -> str:
    """The reason why these are not a plain class and its ranked class; empty if they are."""
    classes = isinstance(plain, type) and isinstance(ranked, type)
    if not classes or not issubclass(plain, nn.Module) or not issubclass(ranked, RankedLayer):
        return (
            "register_layer takes a module's class and a subclass of RankedLayer, "
            f"got {plain!r} and {ranked!r}"
        )
    name = ranked.__name__
    if issubclass(plain, RankedLayer):
        return f"{plain.__name__} is a ranked class itself: give the plain class it stands for"
    if getattr(ranked, "plain", None) is not plain or not issubclass(ranked, plain):
        return (
            f"modules become {name} and plain again: declare it as "
            f"`class {name}(RankedLayer, {plain.__name__})` with `plain = {plain.__name__}`"
        )
    if ranked.__mro__.index(RankedLayer) > ranked.__mro__.index(plain):
        return f"the bases of {name} are in the wrong order: RankedLayer, then {plain.__name__}"
    if ranked.specs.__func__ is RankedLayer.specs.__func__:
        return f"{name} must define specs, which says what its weights are"
    return ""


def ranked_class(kind: type[nn.Module]) -> type[RankedLayer] | None:
    """The ranked class of modules of this class; None if they cannot change form."""
    kind = beneath(kind)
    if issubclass(kind, RankedLayer):
        return kind
    known = _nearest(kind)
    if known is None or known.plain is kind:
        return known
    return None if overridden(kind, known) else derived_class(kind, known)


def class_obstacle(kind: type[nn.Module]) -> str:
    """Why modules of this class cannot change form; empty if they can."""
    kind = beneath(kind)
    if ranked_class(kind) is not None:
        return ""
    if issubclass(kind, torch.jit.ScriptModule):
        return "it is compiled by torch.jit: change the model that it was made from"
    if (known := _nearest(kind)) is None:
        return f"{kind.__name__} layers are not handled"
    names = ", ".join(overridden(kind, known))
    return f"its class {kind.__name__} overrides {names} of {known.plain.__name__}"


def _nearest(kind: type[nn.Module]) -> type[RankedLayer] | None:
    """The ranked class of this class, else of the first of its bases that has one."""
    return next(filter(None, map(_registered, kind.__mro__)), None)


def _registered(kind: type[nn.Module]) -> type[RankedLayer] | None:
    """The ranked class of exactly this class."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind not in _RANKED and name in _BUILT_IN:
        module, ranked_name = _BUILT_IN[name]
        ranked = getattr(import_module(f"dynarank.layers.{module}"), ranked_name)
        _RANKED[ranked.plain] = ranked
    return _RANKED.get(kind)


def readers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The parents that use a child's weight directly (``fused_children``), by child."""
    kinds = [(module, ranked_class(type(module))) for module in model.modules()]
    return {child: m for m, kind in kinds if kind is not None for child in kind.fused_children(m)}
