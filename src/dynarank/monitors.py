"""Readings over time. A monitor only reads: with and without it a run is the same, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynarank.decompositions import UnfitWeightError, precise
from dynarank.forms import FullRank, RankLike, resolve_rank
from dynarank.layers import RankedLayer
from dynarank.selection import LayerFilter, select
from dynarank.spectrum import effective_rank, singular_values, spectral_ratio, stable_rank
from dynarank.survey import Site, survey

__all__ = ["SpectralMonitor", "SpectralReading"]


@dataclass(frozen=True)
class SpectralReading:
    """Rank health of one layer's effective weight.

    Args:
        effective_rank: exp of the entropy of the normalised singular values.
        stable_rank: sum s^2 / s1^2.
        spectral_ratio: lambda at ``rank``.
        rank: the rank lambda is taken at.
        full_rank: the largest rank the weight could have.
    """

    effective_rank: float
    stable_rank: float
    spectral_ratio: float
    rank: int
    full_rank: int


class SpectralMonitor:
    """Reads lambda, effective and stable rank of a model's layers.

    Args:
        model: the model to watch; it is never changed.
        rank: where lambda is taken. None: at the rank each layer has, or last had; 0.5 of the
            output channels for layers that never had factors.
        layers: which layers to watch, a filter or glob patterns; None: the ranked layers, or, if
            there is none, every layer that can change form.

    Example:
        >>> monitor = SpectralMonitor(nn.Sequential(nn.Linear(8, 8)))
        >>> list(monitor.read())
        ['0']
    """

    def __init__(
        self, model: nn.Module, *, rank: RankLike | None = None, layers: LayerFilter = None
    ) -> None:
        self._model = model
        self._rank = rank
        self._layers = layers

    @torch.no_grad()
    def read(self) -> Mapping[str, SpectralReading]:
        """One reading for each watched layer; a layer that is not finite is left out."""
        readings: dict[str, SpectralReading] = {}
        for site in self._watched():
            try:
                readings[site.path] = self._read(site)
            except UnfitWeightError:
                continue
        return readings

    def _watched(self) -> list[Site]:
        if self._layers is not None:
            return select(self._model, self._layers)
        able = [s for s in survey(self._model) if s.form is not None and not s.spec.lookup]
        ranked = [site for site in able if isinstance(site.module, RankedLayer)]
        return ranked or able

    def _read(self, site: Site) -> SpectralReading:
        values = singular_values(_weight(site))
        rank = self._lambda_rank(site, site.shape)
        return SpectralReading(
            effective_rank(values),
            stable_rank(values),
            spectral_ratio(values, rank),
            rank,
            len(values),
        )

    def _lambda_rank(self, site: Site, shape: tuple[int, ...]) -> int:
        if self._rank is not None or site.home is None:
            return resolve_rank(0.5 if self._rank is None else self._rank, shape)
        limit = min(shape[0], math.prod(shape[1:]))  # below that of some decompositions
        return min(int(site.home.rank), limit)  # type: ignore[arg-type]


def _weight(site: Site) -> Tensor:
    """The effective weight; joined in fp64, where rounding cannot raise a low rank."""
    if isinstance(site.form, FullRank):
        return site.effective()
    precisely = {name: precise(p) for name, p in site.parameters().items()}
    assert site.form is not None
    return site.spec.turn(site.spec.effective(site.form, precisely))
