"""A layer whose weight is ``base + scale * join(factors)``, in any of the three forms.

A ranked layer is the user's own module with another class: ``module.__class__`` and its parameters
change, the object stays. So hooks, names, references held elsewhere and modules shared by several
parents all survive a change of form, and the root of a model can change form too. The classes are
ordinary module-level ones, hence copying, pickling and ``isinstance(layer, nn.Linear)`` work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.decompositions import (
    Decomposition,
    Factors,
    Geometry,
    apply,
    get_decomposition,
    linear_map,
    output_shape,
)
from dynarank.forms import Adapted, Execution, Form, FullRank, LowRank, execution_of

__all__ = ["RankedLayer", "effective_weight", "own_parameters", "parameter_names"]


class RankedLayer(nn.Module):
    """What every ranked layer has; the plain layer's class comes second among the bases.

    Its parameters, and so its ``state_dict`` keys, are ``weight`` (full-rank: those of the plain
    layer), the factors' names (low-rank: ``down``, ``up``), or ``base`` and the factors' names
    (adapted); and ``bias`` always.
    """

    plain: ClassVar[type[nn.Module]]
    form: Form
    home: LowRank | Adapted | None  # the last form with factors, for deflate without a rank

    @property
    def geometry(self) -> Geometry:
        """How the weight slides over the layer's input."""
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the effective weight."""
        raise NotImplementedError

    def pad(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """The input as the weight meets it, and how the weight slides over that."""
        return x, self.geometry

    @property
    def weight(self) -> Tensor:  # pyright: ignore
        """The effective weight: the parameter itself if full-rank, else ``base + scale * join``."""
        return effective_weight(self.form, cast(dict[str, Tensor], self._parameters))

    @property
    def base(self) -> Parameter:
        """The frozen weight of the adapted form."""
        return cast(Parameter, self._parameters["base"])

    @property
    def decomposition(self) -> Decomposition:
        """The decomposition of the form at hand; a full-rank layer has none."""
        assert not isinstance(self.form, FullRank)
        return get_decomposition(self.form.decomposition)

    @property
    def factors(self) -> Factors:
        """The factors, in the order the input meets them."""
        return tuple(cast(Tensor, self._parameters[n]) for n in self.decomposition.factor_names)

    def forward(self, input: Tensor) -> Tensor:
        """``layer(x)`` with the effective weight, by the form's own order of multiplication."""
        form = self.form
        x, geometry = self.pad(input)
        bias = self._parameters["bias"]
        if isinstance(form, LowRank):
            return apply(x, self.factors, self.decomposition.stages(geometry), bias)
        if isinstance(form, Adapted) and self._execution(form, x, geometry) == "two-branch":
            *first, last = self.factors
            scaled = (*first, last * form.scale)  # cheaper than scaling the output
            adaptor = apply(x, scaled, self.decomposition.stages(geometry))
            return linear_map(x, self.base, geometry, bias) + adaptor
        return linear_map(x, self.weight, geometry, bias)

    def _execution(self, form: Adapted, x: Tensor, geometry: Geometry) -> Execution:
        shape = self.weight_shape
        output = output_shape(x.shape, shape, geometry)
        return execution_of(form, shape, math.prod(output) // shape[0])

    def extra_repr(self) -> str:
        """The plain layer's, and the form."""
        return f"{super().extra_repr()}, form={self.form}"


def own_parameters(module: nn.Module) -> dict[str, Parameter | None]:
    """The module's own table of parameters: what is written here changes the module."""
    return module._parameters  # pyright: ignore[reportPrivateUsage]


def effective_weight(form: Form, parameters: Mapping[str, Tensor]) -> Tensor:
    """``base + scale * join(factors)`` from the parameters of a weight in ``form``, by name."""
    if isinstance(form, FullRank):
        return parameters["weight"]
    decomposition = get_decomposition(form.decomposition)
    joined = decomposition.join(tuple(parameters[name] for name in decomposition.factor_names))
    if isinstance(form, LowRank):
        return joined
    return parameters["base"] + form.scale * joined


def parameter_names(form: Form) -> tuple[str, ...]:
    """The names of the parameters that make up a weight in this form, base first."""
    if isinstance(form, FullRank):
        return ("weight",)
    names = get_decomposition(form.decomposition).factor_names
    return ("base", *names) if isinstance(form, Adapted) else names
