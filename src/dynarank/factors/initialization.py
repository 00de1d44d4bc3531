"""Initialization of factors: a truncated draw, scaled to the size of the whole.

Legend: W the weight as the model initialized it, f its factors, c a scale.

A random weight spreads its energy over all directions, so that its best rank-r approximation is
small: at rank 1/16 of a square Gaussian matrix a fifth of the energy is left, and with it small
outputs and small gradients of both factors. Only the scale is mended here. The spectrum hardly
matters, and the weight is the model's own draw, whichever way it was initialized.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from dynarank.decompositions import precise
from dynarank.forms import FullRank, LowRank, RankLike
from dynarank.surgery.optimizer_state import Optimizers
from dynarank.surgery.selection import LayerFilter, RankMap, select
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.verbs import factorize

__all__ = ["initialize_factors"]

_Model = TypeVar("_Model", bound=nn.Module)


@torch.no_grad()
def initialize_factors(
    model: _Model,
    rank: RankLike | RankMap,
    *,
    layers: LayerFilter = None,
    decomposition: str = "svd",
    optimizer: Optimizers = None,
) -> _Model:
    """Factorize a model that is not trained yet, so that its weights keep their Frobenius norms.

    ``W -> c join(split(W, rank))`` with ``c = ||W|| / ||join(split(W, rank))||``, shared evenly by
    the factors. :func:`dynarank.factorize` is the same with c = 1, which is right for trained
    weights. A weight that is zero stays zero.

    Args:
        model: a model with full-rank weights as it was initialized; changed in place.
        rank: see :func:`dynarank.factorize`, and so for the others.
        layers: which weights.
        decomposition: the decomposition's name.
        optimizer: the model's optimizer or optimizers, if there are some already.

    Returns:
        The model.

    Raises:
        ValueError: a selected weight has factors already, so that its norm before the truncation is
            not known; or as :func:`dynarank.factorize`.

    Example:
        >>> model = initialize_factors(nn.Sequential(nn.Linear(64, 64)), rank=8)
        >>> model[0].form
        LowRank(rank=8, decomposition='svd')

    Source: Khodak et al., "Initialization and Regularization of Factorized Neural Layers", arXiv
    2105.01029, 2021, for the truncated draw; the scale is ours.
    """
    chosen = select(survey(model), layers, rank, decomposition)
    if ready := [site.path for site in chosen if not isinstance(site.form, FullRank)]:
        raise ValueError(
            f"layers with factors already: {', '.join(ready)}; their weights' norms before the "
            "truncation are not known: initialize a full-rank model, instead of factorize"
        )
    norms = {site.path: _norm(site) for site in chosen}
    factorize(model, rank, layers=layers, decomposition=decomposition, optimizer=optimizer)
    for site in survey(model):
        if site.path in norms and isinstance(site.form, LowRank):
            _scale_to(site, norms[site.path])
    return model


def _norm(site: Site) -> Tensor:
    return precise(site.effective()).norm()


def _scale_to(site: Site, norm: Tensor) -> None:
    factors, now = site.factors(), _norm(site)
    if now > 0:
        for factor in factors:
            factor.copy_(precise(factor) * (norm / now) ** (1 / len(factors)))
