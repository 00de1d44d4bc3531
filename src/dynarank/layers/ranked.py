"""A module whose weights are each ``base + scale * join(factors)``, in any of the three forms.

A ranked layer is the user's own module with another class: ``module.__class__`` and its parameters
change, the object stays. So hooks, names, references held elsewhere and modules shared by several
parents all survive a change of form, and the root of a model can change form too. The classes are
ordinary module-level ones, hence copying, pickling and ``isinstance(layer, nn.Linear)`` work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from dynarank.decompositions import Geometry, apply, linear_map
from dynarank.decompositions.products import Merging, merged_product
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers.execution import Call, Way, choose_way
from dynarank.layers.spec import WeightSpec

__all__ = ["RankedLayer", "effective", "own_parameters"]


_REMEMBERED = 256  # shapes of inputs


class RankedLayer(nn.Module):
    """What every ranked layer has; the plain layer's class comes second among the bases.

    Its parameters, and so its ``state_dict`` keys, are those of the plain layer, except that a
    weight that is low-rank is replaced by its factors (``down``, ``up``), and one that is adapted
    by ``base`` and its factors. The effective weight can be read under its own name in every form.
    """

    plain: ClassVar[type[nn.Module]]
    forms: dict[str, Form]  # by the weight's name
    homes: dict[str, LowRank | Adapted]  # the last form with factors, for deflate without a rank
    _specs: dict[str, WeightSpec]
    _ways: dict[object, Way]  # those taken so far

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """The weights of ``module``, which is of the plain class or of this one."""
        raise NotImplementedError

    @classmethod
    def flaw(cls, module: nn.Module) -> str:
        """Why a module of the plain class would be handled wrongly; empty if it would not."""
        return ""

    @classmethod
    def calls(cls, module: nn.Module, inputs: Mapping[str, object]) -> dict[str, list[Call]]:
        """How a forward pass with these arguments, by name, uses each weight."""
        raise NotImplementedError

    def enter(self) -> None:
        """Called when the module has become ranked, and after each change of form."""
        self.__dict__["_specs"] = {spec.name: spec for spec in type(self).specs(self)}
        self.__dict__["_ways"] = {}

    def leave(self) -> None:
        """Called before the module becomes plain again; every weight is full-rank then."""
        for name in ("forms", "homes", "_specs", "_ways"):
            del self.__dict__[name]
        self.__class__ = self.plain  # type: ignore[assignment]

    @property
    def form(self) -> Form:
        """The form of the layer's only weight."""
        return self.forms["weight"]

    def spec(self, name: str = "weight") -> WeightSpec:
        """The weight of this name."""
        return self._specs[name]

    def effective_weight(self, name: str = "weight") -> Tensor:
        """The parameter itself if full-rank, else ``base + scale * join(factors)``."""
        form = self.forms.get(name, FullRank())
        parameters = cast(dict[str, Tensor], self._parameters)
        return (
            parameters[name]
            if isinstance(form, FullRank)
            else self.spec(name).effective(form, parameters)
        )

    def multiply(
        self, spec: WeightSpec, x: Tensor, geometry: Geometry, bias: Tensor | None
    ) -> Tensor:
        """``x`` times the effective weight plus bias, the way the form says.

        Args:
            spec: the weight.
            x: (..., in) or (batch, in, *positions), padded already if the layer pads by a mode.
            geometry: how the weight slides over ``x``.
            bias: (out,) or None.
        """
        form = self.forms.get(spec.name, FullRank())
        parameters = cast(dict[str, Tensor], self._parameters)
        if isinstance(form, FullRank):
            return linear_map(x, spec.turn(parameters[spec.name]), geometry, bias)
        way = self._way(spec, form, x, geometry)
        if isinstance(form, LowRank) and way.name == "factored":
            return _chain(spec, form, parameters, x, geometry, bias)
        if way.name == "two-branch":
            whole = linear_map(x, spec.turn(_base(spec, form, parameters)), geometry, bias)
            return whole + _chain(spec, form, parameters, x, geometry, None)
        if isinstance(form, Adapted):
            return _merged(spec, form, parameters, x, geometry, bias, way)
        return linear_map(x, spec.turn(spec.effective(form, parameters)), geometry, bias)

    def _way(self, spec: WeightSpec, form: Form, x: Tensor, geometry: Geometry) -> Way:
        grad = torch.is_grad_enabled()
        first = self._parameters[spec.parameter_names(form)[-1]]
        trains = grad and first is not None and first.requires_grad
        call = Call(tuple(x.shape), geometry, grad and x.requires_grad, trains)
        return self.way(spec, form, call)

    def way(self, spec: WeightSpec, form: Form, call: Call) -> Way:
        """The way to compute ``call``, remembered by its shape."""
        if torch.compiler.is_compiling():
            return choose_way(spec, form, call)
        key = spec.name, call.shape, call.input_grad, call.trains
        if key not in self._ways:
            if len(self._ways) >= _REMEMBERED:
                self._ways.clear()
            self._ways[key] = choose_way(spec, form, call)
        return self._ways[key]

    def extra_repr(self) -> str:
        """The plain layer's, and the forms."""
        shown = ", ".join(
            f"form={form}" if name == "weight" else f"{name}={form}"
            for name, form in self.forms.items()
        )
        return ", ".join(filter(None, (super().extra_repr(), shown)))


def effective(name: str) -> property:
    """A property that reads a layer's effective weight of this name."""

    def read(self: RankedLayer) -> Tensor:
        return self.effective_weight(name)

    return property(read, doc="The effective weight: base + scale * join(factors).")


def own_parameters(module: nn.Module) -> dict[str, Parameter | None]:
    """The module's own table of parameters: what is written here changes the module."""
    return module._parameters  # pyright: ignore[reportPrivateUsage]


def _base(spec: WeightSpec, form: Form, parameters: Mapping[str, Tensor]) -> Tensor:
    return parameters[spec.parameter_names(form)[0]]


def _chain(
    spec: WeightSpec,
    form: LowRank | Adapted,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    geometry: Geometry,
    bias: Tensor | None,
) -> Tensor:
    """The factors one after another; an adaptor's are scaled."""
    factors, stages = spec.factors(form, parameters), spec.stages(form, geometry)
    if isinstance(form, Adapted):
        *first, last = factors
        factors = (*first, last * form.scale)  # cheaper than scaling the output
    if form.recompute and torch.is_grad_enabled():
        return checkpoint(apply, x, factors, stages, bias, use_reentrant=False)  # type: ignore[no-any-return]
    return apply(x, factors, stages, bias)


def _merged(
    spec: WeightSpec,
    form: Adapted,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    geometry: Geometry,
    bias: Tensor | None,
    way: Way,
) -> Tensor:
    """One product; under autocast in its dtype, as every product there."""
    factors = spec.factors(form, parameters)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, factors = x.to(dtype), tuple(f.to(dtype) for f in factors)
        bias = None if bias is None else bias.to(dtype)
    unbatched = spec.dims > 0 and x.ndim == spec.dims + 1
    how = Merging(
        spec.decomposition(form),
        form.scale,
        geometry,
        spec.stages(form, geometry),
        way.thin,
        way.keep,
    )
    base = spec.turn(_base(spec, form, parameters))
    y = merged_product(x.unsqueeze(0) if unbatched else x, base, factors, bias, how)
    return y.squeeze(0) if unbatched else y
