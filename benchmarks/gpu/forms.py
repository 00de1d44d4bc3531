"""The forms of a GPT's blocks that are compared: plans by name, the most valuable first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import dynarank as dr
from dynarank.cost import ModelUse, PhaseCost, cost_schedule
from dynarank.forms import LowRank, Plan

__all__ = ["BLOCKS", "LOW", "blocks_of", "decay_like", "phases_of", "plans", "rounded", "share_of"]

BLOCKS = "blocks.*"
LOW = dr.LowRank(dr.Rank(1 / 4, of="min"))
_STEPS = 1000  # of an imagined run, whose phases are timed


def blocks_of(use: ModelUse) -> list[str]:
    """The paths of the matrices in the blocks."""
    return [path for path in use.layers if path.startswith("blocks.")]


def share_of(use: ModelUse, form: LowRank) -> float:
    """The FLOPs of the blocks' matrices in this form, relative to full rank."""
    layers = [use.layers[path] for path in blocks_of(use)]
    whole = sum(one.flops(dr.FullRank()).training for one in layers)
    return sum(one.flops(form).training for one in layers) / whole


def decay_like(use: ModelUse, multiple: int, cuts: int | Sequence[int] = 8) -> dr.schedules.Decay:
    """The decay that costs what :data:`LOW` does, with ranks that are multiples of a number."""
    total = dr.Within(flops=share_of(use, LOW), of="layers", multiple_of=multiple)
    return dr.schedules.decay(total=total, cuts=cuts)


def phases_of(use: ModelUse, schedule: dr.schedules.Schedule) -> Sequence[PhaseCost]:
    """What each phase of a schedule costs; budgets have uniform ranks."""
    return cost_schedule(use, schedule, blocks_of(use), _STEPS).phases


def rounded(plan: Plan, multiple: int) -> Plan:
    """The plan with ranks rounded down to multiples of a number."""
    return {
        path: replace(form, rank=max(multiple, form.rank // multiple * multiple))
        if isinstance(form, LowRank) and isinstance(form.rank, int)
        else form
        for path, form in plan.items()
    }


def plans(use: ModelUse, multiple: int) -> dict[str, Plan]:
    """Each form and phase by its name."""
    paths = blocks_of(use)
    quarter = LOW.rank
    paper = dr.schedules.dynamic_rank(quarter, inflate=0.37, deflate=0.8, to="adapted")
    *_, adapted = phases_of(use, paper)
    found: dict[str, Plan] = {
        "full rank": dict.fromkeys(paths, dr.FullRank()),
        "low rank 1/4": dict.fromkeys(paths, LOW),
        "low rank 1/8": dict.fromkeys(paths, dr.LowRank(dr.Rank(1 / 8, of="min"))),
        "adapted 1/4, the paper's last phase": adapted.plan,
    }
    decay = phases_of(use, decay_like(use, 1))[1:]
    for number in (len(decay), len(decay) // 2, 1):  # the first phase is full rank
        plan = decay[number - 1].plan
        found[f"decay after cut {number}, ranks {multiple} k"] = rounded(plan, multiple)
        found[f"decay after cut {number}"] = plan
    split = {path: dr.Adapted(quarter, execution="two-branch") for path in paths}
    return {**found, "adapted 1/4, two branches": split}
