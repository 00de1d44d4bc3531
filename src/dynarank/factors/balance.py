"""Balanced factors: equal norms, the same weight."""

from __future__ import annotations

import torch
from torch import nn

from dynarank.decompositions import precise
from dynarank.forms import Adapted, LowRank
from dynarank.surgery.selection import LayerFilter, select
from dynarank.surgery.sites import survey

__all__ = ["balance"]


@torch.no_grad()
def balance(model: nn.Module, *, layers: LayerFilter = None) -> list[str]:
    """Balance the factors of all low-rank and adapted weights in place; the function is unchanged.

    ``join(balanced(f)) == join(f)``: an SVD pair gets ``U'U == D D' == diag(s)``, other chains
    factors of equal Frobenius norm. During training the norms drift apart. Optimizer states are not
    updated, so this is best done when they are small or reset.

    Args:
        model: the model.
        layers: a filter or glob patterns; None: every weight with factors.

    Returns:
        The paths of the balanced weights.

    Example:
        >>> balance(dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2))
        ['0']
    """
    sites = survey(model) if layers is None else select(survey(model), layers)
    done: list[str] = []
    for site in sites:
        if isinstance(site.form, LowRank | Adapted):
            if site.sharding is not None:
                raise ValueError(
                    f"layer {site.path!r} is sharded by fully_shard: balance factors before it"
                )
            exact = tuple(precise(f) for f in site.factors())
            balanced = site.spec.decomposition(site.form).balanced(exact)
            for old, new in zip(site.factors(), balanced, strict=True):
                old.copy_(new)
            done.append(site.path)
    return done
