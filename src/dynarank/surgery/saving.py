"""What a low-rank model saves, and a warning if that is hardly anything.

Legend: the saving of a plan is ``1 - entries(plan) / entries(full rank)``, over all weights of two
or more dimensions by which the model multiplies (all but those whose rows are looked up). It is the
saving of FLOPs too if every weight sees as many rows, as in a transformer without its head.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from dynarank.forms import LowRank, Plan
from dynarank.surgery.site import Site

__all__ = ["saving", "warn_of_little"]

_LITTLE = 0.05


def saving(sites: Sequence[Site], plan: Plan) -> float:
    """The share of the entries that the model's weights lose under a plan of resolvable ranks.

    Example:
        >>> from dynarank.surgery.sites import survey
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> saving(survey(model), {"0": LowRank(16)})
        0.25
    """
    multiplied = [site for site in sites if not _looked_up(site)]
    full = sum(math.prod(site.shape) for site in multiplied)
    after = sum(site.entries(plan.get(site.path)) for site in multiplied)
    return 1 - after / full if full else 0.0


def warn_of_little(sites: Sequence[Site], plans: Iterable[Plan], stacklevel: int) -> None:
    """Warn if no low-rank plan of these saves 5% of the model's weights.

    Args:
        sites: those of the model.
        plans: low-rank ones are those with a :class:`LowRank` form.
        stacklevel: as of ``warnings.warn``, counted from the caller of this function.
    """
    low = [plan for plan in plans if any(isinstance(form, LowRank) for form in plan.values())]
    if low and (best := max(saving(sites, plan) for plan in low)) < _LITTLE:
        ranks = {f"{f.rank}" for plan in low for f in plan.values() if isinstance(f, LowRank)}
        warnings.warn(
            f"low rank ({', '.join(sorted(ranks))}) saves {best:.1%} of the entries of the "
            f"weights by which the model multiplies, less than {_LITTLE:.0%}: ask for a lower "
            "rank, or name the layers by layers=...; print(dr.survey(model, rank)) shows why "
            "others are left",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _looked_up(site: Site) -> bool:
    bag = isinstance(site.module, nn.EmbeddingBag)
    return bag or all(one.spec.lookup for one in site.places)
