"""Initialization of factors: Gaussian, with the size that the model gave the weight.

Legend: W the weight as the model initialized it, f its factors.

A random weight spreads its energy over all directions, so that its best approximation of a low
rank is much smaller than it, and so are the layer's outputs and the gradients of the factors. If
each factor is drawn by a layer's usual rule, the product has a wrong scale too, which falls with
the rank. Here the scale is that of W itself, whichever way the model initialized it.
"""

from __future__ import annotations

import zlib
from typing import TypeVar

import torch
from torch import Tensor, nn

from dynarank.decompositions import Factors, precise
from dynarank.decompositions.numerics.multilinear import equal_norms
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
    seed: int | None = None,
    layers: LayerFilter = None,
    decomposition: str = "svd",
    optimizer: Optimizers = None,
) -> _Model:
    """Factorize a model that is not trained yet into random factors of its weights' sizes.

    The factors are Gaussian, of equal norms, with ``||join(f)|| = ||W||`` (Frobenius). For a
    trained model this would be wrong: :func:`dynarank.factorize` keeps its weights. Random
    generators of its own are used; the global random state does not change. A weight of zeros stays
    zero.

    Args:
        model: a model with full-rank weights as it was initialized; changed in place.
        rank: see :func:`dynarank.factorize`, and so for the others.
        seed: the seed of the draws, combined with each path; None: the run's seed.
        layers: which weights.
        decomposition: the decomposition's name.
        optimizer: the model's optimizer or optimizers, if there are some already.

    Returns:
        The model.

    Raises:
        ValueError: a selected weight has factors already, so that its size before the truncation is
            not known; or as :func:`dynarank.factorize`.

    Example:
        >>> model = initialize_factors(nn.Sequential(nn.Linear(64, 64)), rank=8, seed=0)
        >>> model[0].form
        LowRank(rank=8, decomposition='svd')

    Related: Khodak et al., "Initialization and Regularization of Factorized Neural Layers", arXiv
    2105.01029, 2021, who truncate the draw and do not scale it, as ``factorize`` does.
    """
    chosen = select(survey(model), layers, rank, decomposition)
    if ready := [site.path for site in chosen if not isinstance(site.form, FullRank)]:
        raise ValueError(
            f"layers with factors already: {', '.join(ready)}; their weights' sizes before the "
            "truncation are not known: initialize a full-rank model, instead of factorize"
        )
    norms = {site.path: precise(site.effective()).norm().item() for site in chosen}
    factorize(model, rank, layers=layers, decomposition=decomposition, optimizer=optimizer)
    root = torch.initial_seed() if seed is None else seed
    for site in survey(model):
        if isinstance(site.form, LowRank) and norms.get(site.path, 0.0) > 0:
            drawn = _draw(site, site.form, norms[site.path], root ^ zlib.crc32(site.path.encode()))
            for old, new in zip(site.factors(), drawn, strict=True):
                old.copy_(new)
    return model


def _draw(site: Site, form: LowRank, norm: float, seed: int) -> Factors:
    """Gaussian factors of equal norms whose weight has the norm, in fp64 on the CPU."""
    generator = torch.Generator().manual_seed(seed % 2**63)

    def draw(factor: Tensor) -> Tensor:
        return torch.randn(factor.shape, generator=generator, dtype=torch.float64)

    draws = equal_norms(tuple(map(draw, site.factors())))
    now = site.spec.decomposition(form).join(draws).norm().item()
    return equal_norms(draws, norm / now)
