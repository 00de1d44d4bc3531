"""Why a weight of a module cannot change form, though modules of its kind can."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dynarank.forms import Form
from dynarank.layers.ranked import own_parameters
from dynarank.layers.weight import WeightSpec

__all__ = ["weight_obstacle"]


def weight_obstacle(module: nn.Module, spec: WeightSpec, form: Form) -> str:
    """Why changing the form of this weight would go wrong; empty if it would not.

    Args:
        module: the module that owns the weight.
        spec: the weight.
        form: the form it has.

    Example:
        >>> layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
        >>> weight_obstacle(layer, WeightSpec("weight", (4, 4)), dr.FullRank())
        'it is wrapped by torch.nn.utils.parametrize, which owns its weight'
    """
    own = own_parameters(module)
    if is_parametrized(module):
        return "it is wrapped by torch.nn.utils.parametrize, which owns its weight"
    for name in spec.parameter_names(form):
        p = own.get(name)
        if p is None:
            listed = ", ".join(name for name, p in own.items() if p is not None)
            return f"its weight is computed from {listed} (weight_norm, spectral_norm or prune)"
        if not p.is_floating_point():
            return f"its {name} is {p.dtype}: only real floating-point weights are handled"
        if type(p.data) is not Tensor:
            return f"its {name} is a {type(p.data).__name__} (quantized, sharded or the like)"
    return ""
