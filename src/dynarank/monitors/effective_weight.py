"""The singular values of a layer's weight, and of what has been added to it since a start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynarank.decompositions import Factors, precise
from dynarank.forms import Form, FullRank, LowRank, same_weight
from dynarank.layers import WeightSpec
from dynarank.monitors.singular_values import product_singular_values, singular_values
from dynarank.surgery.sites import Site

__all__ = ["LayerWeight", "layer_values", "update_values"]


@dataclass(frozen=True)
class LayerWeight:
    """A layer's weight: what it is, its form, and the parameters that make it up."""

    spec: WeightSpec
    form: Form
    parameters: Mapping[str, Tensor]

    @staticmethod
    def of(site: Site) -> LayerWeight:
        """The weight at a site, sharing its memory."""
        assert site.form is not None
        return LayerWeight(site.spec, site.form, site.parameters())

    def kept(self) -> LayerWeight:
        """A copy on the CPU: factors stay factors."""
        copies = {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()}
        return replace(self, parameters=copies)

    def on(self, device: torch.device) -> LayerWeight:
        """The weight on a device."""
        return replace(self, parameters={n: p.to(device) for n, p in self.parameters.items()})

    @property
    def first(self) -> Tensor:
        """One of the parameters, to know dtype and device by."""
        return next(iter(self.parameters.values()))

    @property
    def finite(self) -> bool:
        """Whether every entry is."""
        return all(bool(torch.isfinite(p).all()) for p in self.parameters.values())

    @property
    def nbytes(self) -> int:
        """The bytes of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.parameters.values())

    def factors(self) -> Factors | None:
        """``down`` and ``up``, as matrices, if the weight is their product; else None."""
        if not isinstance(self.form, LowRank) or self.spec.geometry.groups != 1:
            return None
        if not self.spec.decomposition(self.form).is_pair:
            return None
        return tuple(f.detach().flatten(1) for f in self.spec.factors(self.form, self.parameters))

    def effective(self) -> Tensor:
        """The weight, canonical; joined in fp64, where rounding cannot raise a low rank."""
        if isinstance(self.form, FullRank):
            return self.spec.to_canonical(self.spec.base(self.form, self.parameters)).detach()
        precisely = {name: precise(p) for name, p in self.parameters.items()}
        return self.spec.to_canonical(self.spec.effective(self.form, precisely))


def layer_values(weight: LayerWeight) -> Tensor:
    """The singular values of the effective weight; from its factors if it has no base.

    Raises:
        UnfitWeightError: a value is not finite, or the decomposition does not converge.
    """
    factors = weight.factors()
    if factors is None:
        return singular_values(weight.effective())
    return product_singular_values(*factors)


def update_values(now: LayerWeight, start: LayerWeight, size: float) -> Tensor:
    """The singular values of ``W_now - W_start``, of effective weights, whatever their forms.

    Two products of thin factors are subtracted as one: ``[U, -U_0] [D; D_0]``. A difference that
    rounding in a change of form can make counts as none: all values are then zero.

    Args:
        now: the weight.
        start: what it was.
        size: ||W_now||, Frobenius.

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
    """In fp32 at least, and in no more than the parameters': spectra in fp64 are dear."""
    wide = torch.promote_types(now.first.dtype, torch.float32)
    one, other = now.effective(), start.effective()
    both = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    return (one.to(both) - other.to(both)).to(wide)


def _rounding(now: LayerWeight, start: LayerWeight) -> float:
    """The relative difference that changes of form can make: what they store is rounded once.

    A decomposition and its join, computed in fp32 or fp64, were off by up to 6 eps of that.
    """
    dtype = now.first.dtype
    computed = 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if same_weight(now.form, start.form):  # training alone, most likely, whose steps may be small
        return computed
    return max(computed, 2 * torch.finfo(dtype).eps)
