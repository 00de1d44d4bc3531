"""Why a weight of a module cannot change form, though modules of its kind can."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dynarank.distributed.dtensors import is_dtensor
from dynarank.distributed.fsdp2 import Sharding
from dynarank.forms import Form
from dynarank.layers.own_forward import forward_obstacle
from dynarank.layers.ranked import RankedLayer, own_parameters
from dynarank.layers.subclasses import defined
from dynarank.layers.weight import WeightSpec

__all__ = ["number_obstacle", "weight_obstacle"]

_RANKED = defined((RankedLayer,)) - defined(nn.Module.__mro__)
_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight_obstacle(
    module: nn.Module,
    spec: WeightSpec,
    form: Form,
    reader: nn.Module | None = None,
    sharding: Sharding | None = None,
) -> str:
    """Why changing the form of this weight would go wrong; empty if it would not.

    Args:
        module: the module that owns the weight.
        spec: the weight.
        form: the form it has.
        reader: the parent that uses the weight instead of calling the module, if any.
        sharding: how ``fully_shard`` shards the weight, if it does.

    Example:
        >>> layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
        >>> weight_obstacle(layer, WeightSpec("weight", (4, 4)), dr.FullRank())
        'it is wrapped by torch.nn.utils.parametrize, which owns its weight'
    """
    if reason := _attribute_obstacle(module):
        return reason
    if reader is not None and (reason := _attribute_obstacle(reader)):
        return f"in the {type(reader).__name__} it is part of, {reason}"
    own = own_parameters(module)
    if is_parametrized(module):
        return "it is wrapped by torch.nn.utils.parametrize, which owns its weight"
    for name in spec.parameter_names(form):
        p = own.get(name)
        if p is None:
            listed = ", ".join(name for name, p in own.items() if p is not None)
            return f"its weight is computed from {listed} (weight_norm, spectral_norm or prune)"
        if sharding is not None and (reason := sharding.obstacle(name)):
            return f"its {name} is {reason}"
        if sharding is None and is_dtensor(p):
            return (
                f"its {name} is a DTensor, sharded by tensor parallelism, or by a fully_shard "
                "around this model: then give the model that it was called on"
            )
    return ""


def _attribute_obstacle(module: nn.Module) -> str:
    """Why an attribute of a plain module itself would not be used by the ranked class."""
    if isinstance(module, RankedLayer):
        return ""
    if own := _methods(type(module)) & vars(module).keys():
        return f"its {min(own)} is set on the module itself, which a ranked layer would not use"
    if own := _RANKED & vars(module).keys():
        return f"its attribute {min(own)} has a name that ranked layers use themselves; rename it"
    return forward_obstacle(module)


def number_obstacle(module: nn.Module, spec: WeightSpec, form: Form) -> str:
    """Why the numbers of this weight cannot be computed with; empty if they can.

    Such a weight (quantized, complex, sparse) is left as it is.

    Example:
        >>> layer = nn.Linear(4, 4).to(torch.float8_e4m3fn)
        >>> number_obstacle(layer, WeightSpec("weight", (4, 4)), dr.FullRank())
        'its weight is float8_e4m3fn, not one of float64, float32, bfloat16, float16'
    """
    for name in spec.parameter_names(form):
        p = own_parameters(module).get(name)
        if p is None:
            continue
        if p.dtype not in _NUMBERS:
            handled = ", ".join(_short(dtype) for dtype in _NUMBERS)
            return f"its {name} is {_short(p.dtype)}, not one of {handled}"
        if p.layout is not torch.strided:
            return f"its {name} is {_short(p.layout)}, not dense"
        if type(p.data) is not Tensor and not is_dtensor(p):
            return f"its {name} is a {type(p.data).__name__} (quantized or the like)"
    return ""


def _methods(kind: type[nn.Module]) -> set[str]:
    """The methods of a class of modules that its forward pass may call."""
    below = (c for c in kind.__mro__ if c not in nn.Module.__mro__)
    found = {name for c in below for name, value in vars(c).items() if callable(value)}
    return found - {"forward", "extra_repr", "reset_parameters", "_reset_parameters"}


def _short(name: torch.dtype | torch.layout) -> str:
    return str(name).removeprefix("torch.")
