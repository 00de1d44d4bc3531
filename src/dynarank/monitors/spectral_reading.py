"""One reading of layers' spectra: rank metrics of the weights as they are now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dynarank.decompositions import UnfitWeightError, get_decomposition
from dynarank.forms import Rank, RankLike
from dynarank.monitors.effective_weight import LayerWeight, layer_values, update_values
from dynarank.monitors.singular_values import (
    effective_rank,
    energy_rank,
    spectral_ratio,
    stable_rank,
)
from dynarank.schedules.readings import SpectralReading
from dynarank.surgery.sites import Site

__all__ = ["read_spectra"]


@torch.no_grad()
def read_spectra(
    sites: Iterable[Site],
    *,
    rank: RankLike | None = None,
    values: int = 0,
    starts: Mapping[str, LayerWeight] | None = None,
) -> dict[str, SpectralReading]:
    """One reading for each site, by its path; a weight that is not finite is left out.

    Args:
        sites: the weights to read.
        rank: where lambda is taken, see :class:`dynarank.SpectralMonitor`.
        values: how many singular values to keep in a reading, evenly from the first to the last.
        starts: weights from which the accumulated updates are measured, by path.
    """
    starts, readings = starts or {}, dict[str, SpectralReading]()
    for site in sites:
        try:
            readings[site.path] = _read(site, rank, values, starts.get(site.path))
        except UnfitWeightError:
            continue
    return readings


def _read(
    site: Site, rank: RankLike | None, kept: int, start: LayerWeight | None
) -> SpectralReading:
    weight = LayerWeight.of(site)
    values = layer_values(weight)
    at = _lambda_rank(site, rank)
    return SpectralReading(
        effective_rank(values),
        stable_rank(values),
        energy_rank(values),
        spectral_ratio(values, at),
        at,
        len(values),
        _update_rank(weight, start, values),
        _thinned(values, kept),
    )


def _update_rank(weight: LayerWeight, start: LayerWeight | None, values: Tensor) -> float | None:
    if start is None or start.spec.shape != weight.spec.shape:
        return None
    size = float(torch.linalg.vector_norm(values))
    return effective_rank(update_values(weight, start, size))


def _lambda_rank(site: Site, rank: RankLike | None) -> int:
    shape = site.shape
    if rank is not None or site.last_factored_form is None:
        half = Rank(0.5, of="out")
        return get_decomposition("svd").resolve_rank(half if rank is None else rank, shape)
    limit = min(shape[0], math.prod(shape[1:]))  # below that of some decompositions
    return min(site.last_factored_form.resolved_rank, limit)


def _thinned(values: Tensor, count: int) -> tuple[float, ...]:
    """At most ``count`` of the values, evenly from the first to the last."""
    last = len(values) - 1
    if count <= last:
        places = [round(i * last / max(count - 1, 1)) for i in range(count)]
        values = values[torch.tensor(places, dtype=torch.long, device=values.device)]
    return tuple(values.tolist())
