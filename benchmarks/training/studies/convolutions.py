"""Does anything beat fixed low rank on convolutions at equal FLOPs?

Arms of one budget have the same FLOPs, within 1%. They differ in the start, decomposition, weight
decay, schedule and learning rate. Arms of a seed have the same initial network and batches.
One JSON line a run.

python -m benchmarks.training.studies.convolutions vis2 --data DIR --seeds 0 1 --out runs.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import dynarank as dr
from benchmarks.training.problems.problem import Problem
from benchmarks.training.studies.problems import PROBLEMS
from dynarank.cost import trace
from dynarank.factors.live_sites import LiveSites
from dynarank.forms import FullRank, LowRank, Within
from dynarank.recording.host import commit, hardware
from dynarank.schedules import Phases, schedule_to_data
from dynarank.schedules.base import RankSchedule
from dynarank.schedules.rank_decay import Decay
from dynarank.train.ledger import Ledger


@dataclass(frozen=True)
class Arm:
    """A schedule and what is done beside it.

    Args:
        name: the arm's name; its last word is the budget.
        schedule: the schedule.
        rate: multiplies the problem's learning rate.
        norm_kept: the initial low-rank weights are scaled to the norms of the full ones.
        product_decay: weight decay of the product, in place of that of its factors.
        batches: the number of batches to calibrate on.
    """

    name: str
    schedule: RankSchedule
    rate: float = 1.0
    norm_kept: bool = False
    product_decay: bool = False
    batches: int = 16


def fixed(flops: float, **options: Any) -> RankSchedule:
    """Low rank from the start, uniform if nothing is said."""
    return Phases([0.0], [replace(Within(flops=flops, ranks="uniform"), **options)])


def decay(total: float, first: float, last: float, **options: Any) -> RankSchedule:
    """The decay of this total cost, with four cuts between two times."""
    times = [first * (last / first) ** (i / 3) for i in range(4)]
    return Decay(total=Within(flops=total, multiple_of=1, **options), cuts=times)


def arms(b: float) -> list[Arm]:
    """The arms of a budget, and full rank."""
    low, falling = Arm(f"fixed {b}", fixed(b)), Arm(f"decay {b}", decay(b, 0.03, 0.6))
    energy: dict[str, Any] = {"ranks": "energy", "multiple_of": 1}
    found = [
        Arm("full rank", Phases([0.0], [FullRank()])),
        low,
        falling,
        Arm(f"decay, early {b}", decay(b, 0.005, 0.1)),
        Arm(f"fixed, energy {b}", fixed(b, **energy)),
        replace(low, name=f"fixed, norm {b}", norm_kept=True),
        replace(low, name=f"fixed, product decay {b}", product_decay=True),
        replace(low, name=f"fixed, norm, product decay {b}", norm_kept=True, product_decay=True),
        replace(falling, name=f"decay, product decay {b}", product_decay=True),
    ]
    for name in ("separable", "tucker", "best"):
        own: dict[str, Any] = {"decomposition": name, **(energy if name == "best" else {})}
        found.append(Arm(f"fixed, {name}, norm {b}", fixed(b, **own), norm_kept=True))
        found.append(Arm(f"decay, {name} {b}", decay(b, 0.03, 0.6, decomposition=name)))
    return [*found, *(replace(a, name=f"{k}x {a.name}", rate=k) for a in found for k in (0.5, 2))]


def train(problem: Problem, arm: Arm, seed: int) -> dict[str, Any]:
    """Train once; costs and the test's results."""
    model, layers = problem.model(seed).train(), problem.layers
    rate = arm.rate * problem.rate
    optimizer = problem.optimizer(model, rate)
    if arm.product_decay:
        decay_product(model, optimizer, layers)
    use = trace(model, problem.batch(seed, 0)[0])
    norms = {s.path: s.effective().norm().detach() for s in dr.survey(model, layers=layers)}
    begun = time.process_time()
    ranks = dr.RankScheduler(
        model, optimizer, arm.schedule, problem.steps, layers=layers,
        batches=lambda: problem.inputs(seed, arm.batches),
    )  # fmt: skip
    if arm.norm_kept:
        keep_norms(model, norms)
    ledger = Ledger(use, dr.current_plan(model))
    for step in range(problem.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * problem.factor(step)
        problem.training_loss(model, problem.batch(seed, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ledger.step()
        if ranks.step():
            ledger.turn(dr.current_plan(model))
    seconds = time.process_time() - begun
    ranks.close()
    return {
        "flops": ledger.relative_flops, "end_flops": ledger.last_relative_step,
        "cpu_seconds": seconds, **problem.test(model, "test"), "plan": plan_of(model),
    }  # fmt: skip


@torch.no_grad()
def keep_norms(model: nn.Module, norms: dict[str, torch.Tensor]) -> None:
    """Scale the low-rank weights to these norms."""
    for site in dr.survey(model):
        if isinstance(site.form, LowRank):
            factors, scale = site.factors(), norms[site.path] / site.effective().norm()
            for factor in factors:
                factor.mul_(scale ** (1 / len(factors)))


def decay_product(model: nn.Module, optimizer: Optimizer, layers: str) -> None:
    """Take the layers out of the optimizer's weight decay, and decay their products."""
    own = {id(p) for site in LiveSites(model, layers)() for p in site.parameters().values()}
    (group,) = optimizer.param_groups
    rest = {**group, "params": [p for p in group["params"] if id(p) in own], "weight_decay": 0.0}
    group["params"] = [p for p in group["params"] if id(p) not in own]
    optimizer.add_param_group(rest)
    dr.regularizers.FrobeniusDecay(model, group["weight_decay"], layers=layers).register(optimizer)


def plan_of(model: nn.Module) -> dict[str, str]:
    """The last forms, in short."""
    forms = dr.current_plan(model)
    return {
        path: f"{form.decomposition} {form.rank}" if isinstance(form, LowRank) else "full"
        for path, form in forms.items()
    }


def main() -> None:
    """Run the arms of each budget, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", choices=[k for k in PROBLEMS if k.startswith("vis")])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--length", type=float, default=1.0, help="a share of the problem's steps")
    parser.add_argument("--arms", nargs="+", help="names of arms without the budget; default: all")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = {
        "commit": commit(), "hardware": hardware(torch.device("cpu")),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    problem = PROBLEMS[given.problem](given.data)
    problem.steps = round(given.length * problem.steps)
    precision = "bf16 autocast" if problem.bf16 else "fp32"
    known = {arm.name.removesuffix(f" {given.budget}"): arm for arm in arms(given.budget)}
    for seed in given.seeds:
        for arm in [known[name] for name in given.arms or known]:
            found = train(problem, arm, seed)
            line = {
                "problem": given.problem, "arm": arm.name, "seed": seed, "rate": arm.rate,
                "steps": problem.steps, **found,
                "schedule": schedule_to_data(arm.schedule), "norm_kept": arm.norm_kept,
                "product_decay": arm.product_decay, "batches": arm.batches,
                "precision": precision, **place,
            }  # fmt: skip
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            shown = {k: v for k, v in found.items() if k != "plan"}
            print({k: line[k] for k in ("problem", "arm", "seed", *shown)}, flush=True)


if __name__ == "__main__":
    main()
