"""Rules that choose the rank of each weight from its spectrum.

Legend: s_i the singular values of a weight, largest first, or, with calibration, the square roots
of the energies of its outputs along their principal directions; the share kept at rank r is
``sum_{i<=r} s_i^2 / sum s_i^2``, over all groups of a grouped weight.

The rules are functions from spectra to ranks, for ``factorize(model, rank=...)``. To allocate a
budget over all weights together, use :func:`dynarank.plan_within`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dynarank.decompositions import get_decomposition
from dynarank.decompositions.truncation import output_energies
from dynarank.forms import LowRank, Rank
from dynarank.monitors.calibration import Calibration
from dynarank.monitors.singular_values import energy_rank, stable_rank
from dynarank.surgery.bias import usable_statistics
from dynarank.surgery.selection import LayerFilter, select
from dynarank.surgery.selection import candidates as default_candidates
from dynarank.surgery.sites import Site, survey

__all__ = [
    "Spectra",
    "candidates",
    "energy_threshold",
    "spectra",
    "spectrum",
    "stable_rank_rule",
    "uniform",
]

Spectra = Mapping[str, Tensor]


def spectra(
    model: nn.Module, *, layers: LayerFilter = None, calibration: Calibration | None = None
) -> dict[str, Tensor]:
    """The spectrum of each weight that can change form, (groups, min(n, m)), largest first.

    Args:
        model: any model.
        layers: a filter ``(module, path) -> bool`` or glob patterns; None: every weight except
            embeddings, output layers and small ones.
        calibration: activation statistics; weights without statistics, or all of them with None,
            use their singular values.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> {path: values.shape for path, values in spectra(model).items()}
        {'0': torch.Size([1, 4])}
    """
    return {site.path: spectrum(site, calibration) for site in candidates(model, layers)}


def uniform(spectra: Spectra, share: float, multiple_of: int = 1) -> dict[str, int]:
    """Ranks that are the same share of every weight's full rank, min(n, m).

    Example:
        >>> uniform({"fc": torch.ones(1, 30)}, 0.5, multiple_of=4)
        {'fc': 12}
    """
    rank, svd = Rank(share, "min", multiple_of), get_decomposition("svd")
    sizes = {path: values.shape[-1] for path, values in spectra.items()}
    return {path: svd.resolve_rank(rank, (size, size)) for path, size in sizes.items()}


def energy_threshold(spectra: Spectra, share: float, multiple_of: int = 1) -> dict[str, int]:
    """The smallest rank that keeps a share of each weight's energy, rounded up to a multiple.

    ``min r: sum_{i<=r} s_i^2 >= share * sum s_i^2``, at least 1 and at most full rank.

    Raises:
        ValueError: the share is not in (0, 1].

    Example:
        >>> energy_threshold({"fc": torch.tensor([[3.0, 1.0, 0.1]])}, 0.99)
        {'fc': 2}
    """
    ranks: dict[str, int] = {}
    for path, values in spectra.items():
        least = max(energy_rank(values.square().sum(0).sqrt(), share), 1)
        rounded = math.ceil(least / multiple_of) * multiple_of
        ranks[path] = min(rounded, values.shape[-1])
    return ranks


def stable_rank_rule(now: Spectra, start: Spectra, multiple_of: int = 1) -> dict[str, int]:
    """Ranks by Cuttlefish's rule: stable ranks, scaled so that initial weights would be full-rank.

    ``rank = stable_rank(now) * full_rank / stable_rank(start)``, rounded to the nearest multiple,
    at least one and at most full rank; for a grouped weight the mean over its groups. The stable
    rank itself would be far too small: it counts directions as strong as the strongest.

    Args:
        now: the spectra of the trained weights, without calibration.
        start: the spectra of the same weights at initialization.
        multiple_of: ranks are multiples of this number.

    Raises:
        ValueError: a weight has no spectrum at the start, or was zero then.

    Example:
        >>> flat, falling = torch.ones(1, 4), torch.tensor([[1.0, 0.5, 0.5, 0.5]])
        >>> stable_rank_rule({"fc": falling}, {"fc": flat})
        {'fc': 2}

    Reference:
        Wang et al., "Cuttlefish: Low-Rank Model Training without All the Tuning", arXiv 2305.02538,
        2023.
    """
    ranks: dict[str, int] = {}
    for path, values in now.items():
        before = _stable(start[path]) if path in start else 0.0
        if not before > 0:
            raise ValueError(
                f"layer {path!r} has no spectrum at the start, or was zero; leave it out"
            )
        full = values.shape[-1]
        scaled = _stable(values) * full / before
        nearest = max(round(scaled / multiple_of), 1) * multiple_of
        ranks[path] = min(nearest, full)
    return ranks


def candidates(model: nn.Module, layers: LayerFilter = None) -> list[Site]:
    """The weights selected by ``layers``; None: all that no default leaves out."""
    if layers is not None:
        return select(survey(model), layers)
    return default_candidates(survey(model))


def spectrum(site: Site, calibration: Calibration | None = None) -> Tensor:
    """The spectrum of one weight, see :func:`spectra`."""
    activity = calibration.get(site.path) if calibration else None
    weight = site.effective().detach()
    if activity is not None:
        usable, _ = usable_statistics(site, LowRank(1), activity)
        stored = torch.promote_types(weight.dtype, torch.float32)
        return output_energies(site.exact().to(stored), usable).sqrt()  # as a truncation reads it
    parts = weight.chunk(site.spec.geometry.groups)
    return torch.cat([output_energies(part) for part in parts]).sqrt()


def _stable(values: Tensor) -> float:
    return sum(stable_rank(group) for group in values) / len(values)
