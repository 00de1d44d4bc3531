"""The description of one weight of a module: name, shape, geometry, and parameters in each form.

Forms belong to weights, not to modules, since a module may have several weights (a recurrent layer
has two for each of its layers and directions). Forms, factors and geometry refer to the canonical
weight (out, in / groups, *kernel); the module may store it transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynarank.decompositions import Decomposition, Factors, Geometry, get_decomposition, precise
from dynarank.decompositions.geometry import swap_channels
from dynarank.decompositions.zero_join import zero_join_factors
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers.transforms import is_transformed

__all__ = ["ResolvedWeight", "WeightSpec"]

_LINEAR = Geometry()
# What may be lost when a low-rank weight changes: a share of the change and of the new value, or
# rounding (in eps).
_LOST, _ROUNDING = 0.01, 4


@dataclass(frozen=True)
class WeightSpec:
    """The description of a weight of a module, independent of its form.

    Args:
        name: the name of the parameter in the plain module.
        shape: (out, in / groups, *kernel).
        geometry: stride, padding etc. of a convolution; empty for a linear weight.
        swapped: whether the module stores it as (in, out / groups, *kernel).
        lookup: whether the module looks up rows of it (an embedding) instead of multiplying by it.
    """

    name: str
    shape: tuple[int, ...]
    geometry: Geometry = _LINEAR
    swapped: bool = False
    lookup: bool = False

    @property
    def span(self) -> slice | None:
        """The rows of the parameters that it refers to; None: all."""
        return None

    @property
    def dims(self) -> int:
        """The number of kernel dimensions."""
        return len(self.shape) - 2

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """The shape of one group's weight, to which ranks refer."""
        return self.shape[0] // self.geometry.groups, *self.shape[1:]

    def to_canonical(self, stored: Tensor) -> Tensor:
        """Convert the weight from the module's layout to (out, in / groups, *kernel)."""
        return swap_channels(stored, self.geometry.groups) if self.swapped else stored

    def from_canonical(self, weight: Tensor) -> Tensor:
        """Convert the weight from (out, in / groups, *kernel) to the module's layout."""
        return swap_channels(weight, self.geometry.groups) if self.swapped else weight

    def decomposition(self, form: LowRank | Adapted) -> Decomposition:
        """The form's decomposition, applied to each group if there are several."""
        return get_decomposition(form.decomposition, self.geometry.groups)

    def resolve(self, form: Form) -> Form:
        """The form with its rank resolved to a number of directions.

        Raises:
            ValueError: a rank above the weight's limit, an unknown decomposition.
        """
        if isinstance(form, FullRank):
            return form
        rank = self.decomposition(form).resolve_rank(form.rank, self.shape)
        return form if isinstance(form.rank, int) else replace(form, rank=rank)

    def factor_shapes(self, form: LowRank | Adapted) -> tuple[tuple[int, ...], ...]:
        """The shapes of the factors; the form's rank must be resolved."""
        return self.decomposition(form).shapes(self.shape, form.resolved_rank)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the module's layout."""
        return tuple(self.from_canonical(torch.empty(self.shape, device="meta")).shape)

    def parameter_shapes(self, form: Form) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters in this form, by name; its rank must be resolved."""
        factors = () if isinstance(form, FullRank) else self.factor_shapes(form)
        whole = () if isinstance(form, LowRank) else (self.stored_shape,)
        return dict(zip(self.parameter_names(form), (*whole, *factors), strict=True))

    def same_parameters(self, one: Form, other: Form) -> bool:
        """Whether two forms have parameters of the same names and shapes."""
        return self.parameter_shapes(one) == self.parameter_shapes(other)

    def stages(self, form: LowRank | Adapted, geometry: Geometry) -> tuple[Geometry, ...]:
        """The geometries of the factors; the form's rank must be resolved."""
        return self.decomposition(form).stages(geometry, form.resolved_rank)

    def parameter_names(self, form: Form) -> tuple[str, ...]:
        """The names of the parameters that form the weight in this form, base first.

        For ``weight`` they are ``base``, ``down``, ``up``; other weights use their name as prefix.
        """
        if isinstance(form, FullRank):
            return (self.name,)
        factors = self.decomposition(form).factor_names(self.dims)
        names = ("base", *factors) if isinstance(form, Adapted) else factors
        return names if self.name == "weight" else tuple(f"{self.name}_{n}" for n in names)

    def is_base(self, name: str) -> bool:
        """Whether a parameter of this name is the frozen weight of the adapted form."""
        return name == ("base" if self.name == "weight" else f"{self.name}_base")

    def resolved(self, form: Form) -> ResolvedWeight:
        """The weight in this form, with its decomposition and parameter names looked up once."""
        names = self.parameter_names(form)
        if isinstance(form, FullRank):
            return ResolvedWeight(self, form, names, None, ())
        stages = self.stages(form, self.geometry)
        return ResolvedWeight(self, form, names, self.decomposition(form), stages)

    def factors(self, form: LowRank | Adapted, parameters: Mapping[str, Tensor]) -> Factors:
        """The factors from a module's parameters, from input to output."""
        return self.resolved(form).factors(parameters)

    def base(self, form: FullRank | Adapted, parameters: Mapping[str, Tensor]) -> Tensor:
        """The base from a module's parameters, in the module's layout."""
        return self.resolved(form).base(parameters)

    def effective(self, form: Form, parameters: Mapping[str, Tensor]) -> Tensor:
        """The effective weight ``base + scale * join(factors)``, in the module's layout."""
        return self.resolved(form).effective(parameters)

    def rows(self, start: int, stop: int) -> WeightSpec:
        """The rows of a linear weight for the outputs from ``start`` to ``stop``."""
        assert not self.dims and not self.swapped and self.geometry.groups == 1, self
        if (start, stop) == (0, self.shape[0]):
            return self
        shape = (stop - start, *self.shape[1:])
        return _Rows(self.name, shape, self.geometry, start=start, whole=self.shape[0])


@dataclass(frozen=True)
class _Rows(WeightSpec):
    """Rows of a linear weight: those of its base and of its last factor, in any decomposition."""

    start: int = 0
    whole: int = 0  # rows

    @property
    def span(self) -> slice | None:
        return slice(self.start, self.start + self.shape[0])

    def factor_shapes(self, form: LowRank | Adapted) -> tuple[tuple[int, ...], ...]:
        whole = replace(self, shape=(self.whole, *self.shape[1:]))
        *first, last = super(_Rows, whole).factor_shapes(form)
        return *first, (self.shape[0], *last[1:])


@dataclass(frozen=True)
class ResolvedWeight:
    """A weight in one form, with everything cached that a forward pass needs.

    Args:
        spec: the description of the weight.
        form: its form, with a resolved rank.
        names: the names of its parameters, base first.
        decomposition: the decomposition of its factors; None if it is full-rank.
        own_stages: the geometries of the factors for the weight's own geometry.
    """

    spec: WeightSpec
    form: Form
    names: tuple[str, ...]
    decomposition: Decomposition | None
    own_stages: tuple[Geometry, ...]

    def factors(self, parameters: Mapping[str, Tensor]) -> Factors:
        """The factors from a module's parameters, from input to output."""
        names = self.names[1:] if isinstance(self.form, Adapted) else self.names
        found = tuple([parameters[name] for name in names])
        span = self.spec.span
        return found if span is None else (*found[:-1], found[-1][span])

    def base(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The base from a module's parameters, in the module's layout."""
        base, span = parameters[self.names[0]], self.spec.span
        if base.requires_grad and isinstance(self.form, Adapted) and not is_transformed():
            base = base.detach()  # frozen, whatever model.requires_grad_() has set
        return base if span is None else base[span]

    def joined(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """``join(factors)``, in canonical layout."""
        assert self.decomposition is not None, self.form
        return self.decomposition.join(self.factors(parameters))

    def effective(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The effective weight ``base + scale * join(factors)``, in the module's layout."""
        if isinstance(self.form, FullRank):
            return self.base(parameters)
        joined = self.spec.from_canonical(self.joined(parameters))
        if isinstance(self.form, LowRank):
            return joined
        base = self.base(parameters)
        return (base + self.form.scale * joined).to(base.dtype)  # an adapter may be of another

    def write_(self, parameters: Mapping[str, Tensor], value: Tensor, fit: bool = False) -> float:
        """Write a value to the parameters, all of it or nothing.

        An adapted weight gets it as its base, and its adapter's output becomes zero; a low-rank
        weight gets its truncation.

        Args:
            parameters: the module's.
            value: in the module's layout.
            fit: whether it is a change of the old value, which must not be lost.

        Returns:
            The relative error of what the weight is then.

        Raises:
            ValueError: the shape is another one, or the rank does not hold the change.
            UnfitWeightError: the value is not finite or cannot be decomposed.
        """
        stored = self.spec.stored_shape
        if value.shape != stored:
            raise ValueError(
                f"{self.spec.name} is {stored} in this layer, got {tuple(value.shape)}"
            )
        if parameters[self.names[-1]].is_meta:
            return 0.0
        if isinstance(self.form, LowRank):
            return self._truncate_(parameters, value, fit)
        self.base(parameters).copy_(value)
        if isinstance(self.form, Adapted):
            self._zero_(self.factors(parameters))
        return 0.0

    def _truncate_(self, parameters: Mapping[str, Tensor], value: Tensor, fit: bool) -> float:
        assert self.decomposition is not None and isinstance(self.form, LowRank)
        factors, weight = self.factors(parameters), self.spec.to_canonical(precise(value))
        norm = weight.norm().item()
        if not norm:
            self._zero_(factors)
            return 0.0
        split = self.decomposition.split(weight, self.form.resolved_rank)
        lost = (self.decomposition.join(split) - weight).norm().item()
        if fit:
            change = (weight - precise(self.joined(parameters))).norm().item()
            self._check_fit(lost, change, norm, torch.finfo(value.dtype).eps)
        for factor, new in zip(factors, split, strict=True):
            factor.copy_(new)
        return lost / norm

    def _zero_(self, factors: Factors) -> None:
        """Make the join zero, such that it can train: only the last factor is zero."""
        factors[-1].zero_()
        if not all(bool(factor.isfinite().all()) for factor in factors):
            shapes = [tuple(factor.shape) for factor in factors]
            drawn = zero_join_factors(shapes, torch.initial_seed())
            for factor, new in zip(factors, drawn, strict=True):
                factor.copy_(new)

    def _check_fit(self, lost: float, change: float, norm: float, eps: float) -> None:
        part = min(change, norm)  # a change to nearly zero is larger than what is left
        if lost > max(_ROUNDING * eps * max(change, norm), _LOST * part):
            name, share, what = self.spec.name, lost / max(part, lost), "of this change"
            if norm < change:
                what = "of the new value"
            raise ValueError(
                f"the rank of {name}, {self.form}, would lose {share:.0%} {what}; call "
                "inflate(model) first, or truncate the new value on purpose: "
                f"layer.set_weight_({name!r}, value); the layer is as it was"
            )

    def stages(self, geometry: Geometry) -> tuple[Geometry, ...]:
        """The geometries of the factors if the weight has this ``geometry``."""
        if geometry is self.spec.geometry or geometry == self.spec.geometry:
            return self.own_stages
        assert not isinstance(self.form, FullRank), self.form
        return self.spec.stages(self.form, geometry)

    def rows(self, start: int, stop: int) -> ResolvedWeight:
        """The rows of a linear weight for the outputs from ``start`` to ``stop``."""
        return replace(self, spec=self.spec.rows(start, stop))
