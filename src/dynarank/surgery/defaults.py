"""Which weights no call takes by default: lookups, output layers, wrapped and small weights.

Legend: n, m the sides of a weight (of one group, if there are several) as a matrix.

Written here once for every default: of the verbs, the rank scheduler and the allocation of ranks.
``layers=...`` has the last word over all of it. What is left:

- *Embeddings*: their rows are looked up, which costs nothing. Weights tied to one stay with it.
- *Output layers*, see :mod:`dynarank.surgery.outputs`.
- *Wrapped weights*, which ``weight_norm``, ``spectral_norm``, ``parametrize`` or ``prune`` compute:
  wav2vec2 has one. Naming them is an error.
- *Small weights*: a side below 16. At half its cost, such a weight has a rank below mn / 2(m + n) <
  8, less than the narrowest tile of matrix hardware (8 fp32 lanes of AVX2, m16n8k16 of NVIDIA's
  tensor cores since 2020), so that nothing is saved but padding.

A model with nothing else to factorize has its small weights taken, and if it has none of those, its
output layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from dynarank.layers import own_parameters
from dynarank.surgery.outputs import output_layers
from dynarank.surgery.site import Site

__all__ = ["SMALLEST_SIDE", "with_defaults"]

SMALLEST_SIDE = 16
_LOOKUP = "embedding: rows are looked up"


def with_defaults(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """The sites of a model, with the reason why a default leaves them, if it does."""
    lookups = {id(s): _LOOKUP for s in sites if any(one.spec.lookup for one in s.places)}
    lookups |= {id(s): s.obstacle for s in sites if s.refused and _computed(s)}
    multiplied = [s for s in sites if id(s) not in lookups]
    ends = output_layers(model, [one for s in sites for one in s.places])
    outputs = {id(s): why for s in multiplied for one in s.places if (why := ends.get(one.module))}
    small = {id(s): why for s in multiplied if id(s) not in outputs and (why := _small(s))}
    for reasons in (small | outputs, outputs, {}):
        if any(id(s) not in reasons and (s.form is not None or s.refused) for s in multiplied):
            break
    reasons = lookups | reasons
    return [replace(s, left_out=reasons[id(s)]) if id(s) in reasons else s for s in sites]


def _computed(site: Site) -> bool:
    """Whether the weight is computed from other parameters, so that it has a meaning of its own."""
    return site.spec.name not in own_parameters(site.module)


def _small(site: Site) -> str:
    if not site.shape:  # lazy
        return ""
    n, *m = site.spec.unit_shape
    side = min(n, math.prod(m))
    return f"too small: side {side} < {SMALLEST_SIDE}" if side < SMALLEST_SIDE else ""
