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

from dynarank.decompositions import Geometry, apply, linear_map, precise
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers.execution import Call, Execution, choose_execution
from dynarank.layers.merged import Merging, merged_product
from dynarank.layers.weight import WeightSpec

__all__ = ["RankedLayer", "effective", "own_parameters"]


_REMEMBERED = 256  # shapes of inputs
_FULL_RANK = FullRank()


class RankedLayer(nn.Module):
    """What every ranked layer has; the plain layer's class comes second among the bases.

    Its parameters, and so its ``state_dict`` keys, are those of the plain layer, except that a
    weight that is low-rank is replaced by its factors (``down``, ``up``), and one that is adapted
    by ``base`` and its factors. The effective weight can be read under its own name in every form.
    """

    plain: ClassVar[type[nn.Module]]
    forms: dict[str, Form]  # by the weight's name
    last_factored_forms: dict[
        str, LowRank | Adapted
    ]  # the last form with factors, for deflate without a rank
    _specs: dict[str, WeightSpec]
    _ways: dict[object, Execution]  # those taken so far

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """The weights of ``module``, which is of the plain class or of this one."""
        raise NotImplementedError

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str:
        """Why a module of the plain class would be handled wrongly; empty if it would not."""
        return ""

    @classmethod
    def calls(cls, module: nn.Module, inputs: Mapping[str, object]) -> dict[str, list[Call]]:
        """How a forward pass with these arguments, by name, uses each weight.

        The weights of a child that :meth:`reads` lists too, under ``child.name``.
        """
        raise NotImplementedError

    @classmethod
    def fused_children(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        """Children whose weights the plain forward pass reads, rather than calling the child.

        The module becomes ranked with them, and calls them then.
        """
        return ()

    def enter(self) -> None:
        """Called when the module has become ranked, and after each change of form."""
        self.__dict__["_specs"] = {spec.name: spec for spec in type(self).specs(self)}
        self.__dict__["_ways"] = {}

    def leave(self) -> None:
        """Called before the module becomes plain again; every weight is full-rank then."""
        for name in ("forms", "last_factored_forms", "_specs", "_ways"):
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
        form = self.forms.get(name, _FULL_RANK)
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
        form = self.forms.get(spec.name, _FULL_RANK)
        parameters = cast(dict[str, Tensor], self._parameters)
        if isinstance(form, FullRank):
            return linear_map(x, spec.turn(spec.base(form, parameters)), geometry, bias)
        way = self._way(spec, form, x, geometry)
        if isinstance(form, LowRank) and way.name == "factored":
            return _chain(spec, form, parameters, x, geometry, bias)
        if isinstance(form, Adapted) and way.name == "two-branch":
            whole = linear_map(x, spec.turn(spec.base(form, parameters)), geometry, bias)
            return whole + _chain(spec, form, parameters, x, geometry, None)
        if isinstance(form, Adapted):
            return _merged(spec, form, parameters, x, geometry, bias, way)
        return linear_map(x, spec.turn(spec.effective(form, parameters)), geometry, bias)

    def _way(self, spec: WeightSpec, form: Form, x: Tensor, geometry: Geometry) -> Execution:
        grad = torch.is_grad_enabled()
        last = self._parameters[spec.parameter_names(form)[-1]]
        trains = grad and last is not None and last.requires_grad
        input_grad = grad and x.requires_grad
        if not torch.compiler.is_compiling():  # the usual case, before anything is built
            known = self._ways.get((spec.name, spec.shape, x.shape, input_grad, trains))
            if known is not None:
                return known
        call = Call(tuple(x.shape), geometry, input_grad, trains)
        return self.way(spec, form, call, (spec.name, spec.shape, x.shape, input_grad, trains))

    def way(self, spec: WeightSpec, form: Form, call: Call, key: object = None) -> Execution:
        """The way to compute ``call``, remembered by the key, or else by the call itself."""
        if torch.compiler.is_compiling():
            return choose_execution(spec, form, call)
        key = key or (spec.name, spec.shape, call)
        if key not in self._ways:
            if len(self._ways) >= _REMEMBERED:
                self._ways.clear()
            self._ways[key] = choose_execution(spec, form, call)
        return self._ways[key]

    @torch.no_grad()
    def set_weight_(self, name: str, weight: Tensor) -> None:
        """Give a weight this value in the form it has: truncated if low-rank, the base if adapted.

        Args:
            name: the weight's.
            weight: the way the module keeps it.
        """
        form, spec = self.forms[name], self.spec(name)
        parameters = cast(dict[str, Tensor], self._parameters)
        if isinstance(form, LowRank):
            split = spec.decomposition(form).split(spec.turn(precise(weight)), form.resolved_rank)
            for factor, value in zip(spec.factors(form, parameters), split, strict=True):
                factor.copy_(value)
            return
        spec.base(form, parameters).copy_(weight)
        if isinstance(form, Adapted):
            spec.factors(form, parameters)[-1].zero_()

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


def _chain(
    spec: WeightSpec,
    form: LowRank | Adapted,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    geometry: Geometry,
    bias: Tensor | None,
) -> Tensor:
    """The factors one after another; an adapter's are scaled."""
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
    way: Execution,
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
    base = spec.turn(spec.base(form, parameters))
    y = merged_product(x.unsqueeze(0) if unbatched else x, base, factors, bias, how)
    return y.squeeze(0) if unbatched else y
