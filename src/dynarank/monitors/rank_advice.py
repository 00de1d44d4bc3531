"""What a spectrum says about cutting a weight: to which rank, for which saving, and whether at all.

Legend: (n, m) the weight as a matrix, r a rank, p the share of its energy (the sum of s^2) kept.

Two factors have r (n + m) parameters, so that they break even at r (n + m) = n m. The energy that
is kept tells the change of the weight, ``||W - W_r||^2 = (1 - p) ||W||^2``; what that does to a
model's accuracy is to be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dynarank.files.json_data import dump_json
from dynarank.form_data import form_to_data
from dynarank.forms import LowRank
from dynarank.monitors.singular_values import energy_rank
from dynarank.monitors.stored_weight import StoredWeight
from dynarank.monitors.stored_weights import Role

__all__ = [
    "RankAdvice",
    "advise",
    "break_even_rank",
    "plan_text",
    "suggested_plan",
    "summary_lines",
]

_SMALL = 16  # the smallest side that the library factorizes by default
_LEVELS = (0.99, 0.97, 0.95, 0.9)  # of energy, in the sentence that sums up


@dataclass(frozen=True)
class RankAdvice:
    """What a spectrum says about cutting one weight.

    Args:
        weight: the weight.
        energy: the share of energy that is to be kept.
        rank: the smallest rank that keeps it.
        break_even: the largest rank at which two factors have fewer parameters than the weight.
        saved: how many parameters ``rank`` saves; 0 if none.
        half_energy: the share of energy kept at the largest rank with half of the parameters.
        left: why the weight is left out of the plan whatever its spectrum; empty if it is not.
    """

    weight: StoredWeight
    energy: float
    rank: int
    break_even: int
    saved: int
    half_energy: float
    left: str

    @property
    def cuts(self) -> bool:
        """Whether the plan cuts this weight."""
        return self.saved > 0 and not self.left

    @property
    def verdict(self) -> str:
        """In a few words: what to do with the weight."""
        if self.left:
            return f"leave: {self.left}"
        if self.cuts:
            return f"cut to {self.rank}: -{self.saved / self.weight.parameters:.0%}"
        return f"keep: {self.half_energy:.0%} at half size"


def break_even_rank(n: int, m: int) -> int:
    """The largest r with r (n + m) < n m.

    Example:
        >>> break_even_rank(768, 3072), break_even_rank(2, 2)
        (614, 0)
    """
    return max((n * m - 1) // (n + m), 0)


def advise(weight: StoredWeight, values: Tensor, energy: float, role: Role = "") -> RankAdvice:
    """What the singular values of a weight say about cutting it.

    Args:
        weight: the weight.
        values: its singular values, largest first.
        energy: the share of energy to keep, in (0, 1].
        role: embeddings and heads are left, as everywhere in the library.

    Example:
        >>> weight = StoredWeight("fc", (64, 64), ("fc.weight",), tuple, 4096)
        >>> advise(weight, torch.cat([torch.ones(8), torch.zeros(56)]), 0.99).verdict
        'cut to 8: -75%'
    """
    n, m = weight.matrix
    rank = energy_rank(values, energy)
    half = weight.parameters // (2 * (n + m))
    total = float(values.square().sum())
    kept = float(values[:half].square().sum()) / total if total else 1.0
    saved = max(weight.parameters - max(rank, 1) * (n + m), 0)
    left = _left(weight, role)
    return RankAdvice(weight, energy, rank, break_even_rank(n, m), saved, kept, left)


def _left(weight: StoredWeight, role: Role) -> str:
    """Why a weight is left whatever its spectrum."""
    if weight.kind == "update":
        return "LoRA"
    if role:
        return role
    if len(weight.shape) > 2 and weight.shape[1] == 1:
        return "depthwise"  # or of one input channel: neither has a rank to cut
    if weight.groups > 1:
        return f"{weight.groups} groups"
    return "small" if min(weight.matrix) < _SMALL else ""


def suggested_plan(advice: Sequence[RankAdvice]) -> dict[str, dict[str, object]]:
    """The plan that cuts each weight where its rank saves: plain data, paths of modules to forms.

    Only weights whose layer can change form are in it: what was stored as a weight or its factors.
    Rebuilt weights and single experts would first have to be saved plain.
    """
    found = (one for one in advice if one.cuts and _is_of_a_layer(one.weight))
    return {one.weight.name: form_to_data(LowRank(max(one.rank, 1))) for one in found}


def _is_of_a_layer(weight: StoredWeight) -> bool:
    name = weight.tensors[0].rpartition(".")[2]  # weight, in_proj_weight, weight_ih_l0
    return weight.kind == "low-rank" or (weight.kind == "plain" and "weight" in name)


def plan_text(advice: Sequence[RankAdvice]) -> str:
    """The suggested plan as the JSON that :func:`dynarank.form_data.read_plan` takes."""
    return dump_json(suggested_plan(advice)) + "\n"


def summary_lines(advice: Sequence[RankAdvice]) -> list[str]:
    """The verdict on a whole model: what ranks save, and what half would keep."""
    if not advice:
        return []
    total = sum(one.weight.parameters for one in advice)
    cut = [one for one in advice if one.cuts]
    saved = sum(one.saved for one in cut)
    level = f"{100 * advice[0].energy:.6g}%"
    head = f"{total:,} parameters in {len(advice)} weights; rank at {level} of the energy"
    able = [one for one in advice if not one.left]
    if not able:
        return [f"{head}: no weight that low rank is for."]
    share = f"saves {saved:,} ({saved / total:.1%}) in {len(cut)} of {len(able)} layers"
    return [f"{head} {share if cut else 'saves nothing'}.", _halves(able)]


def _halves(able: Sequence[RankAdvice]) -> str:
    for level in _LEVELS:
        count = sum(one.half_energy >= level for one in able)
        if count:
            verb, whose = ("keeps", "its") if count == 1 else ("keep", "their")
            share = f"{level:.0%} of {whose} energy"
            return f"{count} of {len(able)} layers {verb} {share} at half size."
    return f"No layer keeps {_LEVELS[-1]:.0%} of its energy at half size: train low-rank instead."
