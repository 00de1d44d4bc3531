"""The singular values of a layer's effective weight, and of its accumulated update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynarank.decompositions import Factors, precise
from dynarank.form_data import form_from_data, form_to_data
from dynarank.forms import Form, FullRank, LowRank, same_weight
from dynarank.layers import WeightSpec
from dynarank.monitors.singular_values import product_singular_values, singular_values
from dynarank.surgery.sites import Site

__all__ = ["LayerWeight", "layer_values", "update_values"]


@dataclass(frozen=True)
class LayerWeight:
    """A layer's weight: its description, its form and its parameters."""

    spec: WeightSpec
    form: Form
    parameters: Mapping[str, Tensor]

    @staticmethod
    def of(site: Site) -> LayerWeight:
        """The weight at a site, sharing its memory unless it is sharded."""
        assert site.form is not None
        return LayerWeight(site.spec, site.form, site.values())

    def kept(self) -> LayerWeight:
        """A copy on the CPU; factors are kept as factors."""
        copies = {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()}
        return replace(self, parameters=copies)

    def on(self, device: torch.device) -> LayerWeight:
        """The weight, moved to a device."""
        return replace(self, parameters={n: p.to(device) for n, p in self.parameters.items()})

    def state_dict(self) -> dict[str, Any]:
        """The form as plain data, and the parameters."""
        return {"form": form_to_data(self.form), "parameters": dict(self.parameters)}

    @staticmethod
    def saved(spec: WeightSpec, state: Mapping[str, Any]) -> LayerWeight:
        """The weight of this description that a state holds.

        Raises:
            ValueError: it is that of another weight.
        """
        form = spec.resolve(form_from_data(state["form"]))
        found = {name: tuple(p.shape) for name, p in state["parameters"].items()}
        if found != (wanted := spec.parameter_shapes(form)):
            raise ValueError(
                f"the saved {spec.name} has the parameters {found}, in the form {form} this "
                f"layer's has {wanted}; it is the state of another model"
            )
        return LayerWeight(spec, form, {n: p.to("cpu") for n, p in state["parameters"].items()})

    @property
    def first(self) -> Tensor:
        """One of the parameters, for their dtype and device."""
        return next(iter(self.parameters.values()))

    @property
    def finite(self) -> bool:
        """Whether every entry is finite."""
        return all(bool(torch.isfinite(p).all()) for p in self.parameters.values())

    @property
    def nbytes(self) -> int:
        """The memory of the parameters, in bytes."""
        return sum(p.numel() * p.element_size() for p in self.parameters.values())

    def factors(self) -> Factors | None:
        """``down`` and ``up``, as matrices, if the weight is their product; else None."""
        if not isinstance(self.form, LowRank) or self.spec.geometry.groups != 1:
            return None
        if not self.spec.decomposition(self.form).is_pair:
            return None
        return tuple(f.detach().flatten(1) for f in self.spec.factors(self.form, self.parameters))

    def effective(self) -> Tensor:
        """The weight in canonical layout, joined in fp64: rounding could raise its rank."""
        if isinstance(self.form, FullRank):
            return self.spec.to_canonical(self.spec.base(self.form, self.parameters)).detach()
        precisely = {name: precise(p) for name, p in self.parameters.items()}
        return self.spec.to_canonical(self.spec.effective(self.form, precisely))


def layer_values(weight: LayerWeight) -> Tensor:
    """The singular values of the effective weight, computed from its factors if it has no base.

    Raises:
        UnfitWeightError: a value is not finite, or the decomposition does not converge.
    """
    factors = weight.factors()
    if factors is None:
        return singular_values(weight.effective())
    return product_singular_values(*factors)


def update_values(now: LayerWeight, start: LayerWeight, size: float) -> Tensor:
    """The singular values of the update ``W_now - W_start`` of an effective weight, in any forms.

    Two products of thin factors are subtracted as one: ``[U, -U_0] [D; D_0]``. A difference within
    the rounding errors of changes of form counts as zero: all values are then zero.

    Args:
        now: the current weight.
        start: the initial weight.
        size: the Frobenius norm ||W_now||.

    Raises:
        UnfitWeightError: a value is not finite, or the decomposition does not converge.
    """
    start = start.on(now.first.device)
    new, old = now.factors(), start.factors()
    if new is not None and old is not None:
        down = torch.cat([precise(new[0]), precise(old[0])])
        up = torch.cat([precise(new[1]), -precise(old[1])], 1)
        values = product_singular_values(down, up)
    else:
        values = singular_values(_difference(now, start))
    below = float(torch.linalg.vector_norm(values)) <= _rounding(now, start) * size
    return torch.zeros_like(values) if below else values


def _difference(now: LayerWeight, start: LayerWeight) -> Tensor:
    """The difference in the parameters' dtype, at least fp32; spectra in fp64 are expensive."""
    wide = torch.promote_types(now.first.dtype, torch.float32)
    one, other = now.effective(), start.effective()
    both = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    return (one.to(both) - other.to(both)).to(wide)


def _rounding(now: LayerWeight, start: LayerWeight) -> float:
    """A bound on the relative rounding error of changes of form: stored values are rounded once.

    A decomposition and its join, computed in fp32 or fp64, were off by up to 6 eps.
    """
    dtype = now.first.dtype
    computed = 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if same_weight(now.form, start.form):  # most likely training steps only, which may be small
        return computed
    return max(computed, 2 * torch.finfo(dtype).eps)
