"""The bias of a layer whose weight is truncated: it makes up for the mean of the outputs cut off.

Only if it is the layer's alone, and trains: a shared or frozen bias stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynarank.decompositions import UnfitWeightError
from dynarank.decompositions.truncation import ActivationStats
from dynarank.forms import Form, LowRank
from dynarank.layers import own_parameters
from dynarank.surgery.sites import Site

__all__ = ["bias_shift", "usable_statistics"]


def usable_statistics(
    site: Site, after: Form, activity: ActivationStats | None
) -> tuple[ActivationStats | None, str]:
    """The statistics for a change of form, and why the bias stays although they would move it.

    Without the bias the best projection is that of the second moments, not of the covariance.
    """
    if activity is None or activity.mean is None or not isinstance(after, LowRank):
        return activity, ""
    optimal = site.spec.decomposition(after).truncates_optimally
    reason = _obstacle(site) if optimal else ""
    return (activity.uncentered() if reason else activity), reason


def _obstacle(site: Site) -> str:
    """Why a truncation must not move the layer's bias; empty if it may."""
    bias = own_parameters(site.module).get("bias") if site.spec.name == "weight" else None
    if bias is None:
        return "no bias of its own"
    if site.tied:
        return "a weight that other layers share, each with its bias"
    if site.bias_shared_with:
        return f"a bias tied to {', '.join(site.bias_shared_with)}"
    return "" if bias.requires_grad and not bias.is_inference() else "a frozen bias"


def bias_shift(site: Site, shift: Tensor) -> Tensor:
    """The shift as the bias stores it.

    Raises:
        UnfitWeightError: the bias would not be finite.
    """
    bias = own_parameters(site.module)["bias"]
    assert bias is not None
    shift = shift.to(bias.device, bias.dtype)
    if not torch.isfinite(bias + shift).all():
        raise UnfitWeightError(
            f"layer {site.path!r}: its bias would hold NaN or values too large for {bias.dtype}"
        )
    return shift
