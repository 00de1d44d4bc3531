"""What helps a low-rank network train: the size of its initial weights, rates, decay, conditioning?

Each arm changes one thing. Arms of a seed have the same initial network and batches. ``--length``
shortens the runs. One JSON line a run; summarize.py prints the tables.

python -m benchmarks.training.studies.factors fash lm2 --data DIR --seeds 0 1 2 --out runs.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import dynarank as dr
from benchmarks.training.problems.problem import Problem
from benchmarks.training.studies.problems import PROBLEMS
from dynarank.cost import trace
from dynarank.factors.initialization import initialize_factors
from dynarank.factors.learning_rates import FactorLearningRates
from dynarank.recording.host import commit, hardware
from dynarank.scheduler.batch_norm import recalibrate_batch_norms
from dynarank.surgery.sites import Site
from dynarank.train.ledger import Ledger

RANKS = {"fash": dr.Rank(1 / 16, of="min"), "lm2": dr.Rank(1 / 4, of="min")}
RANKS["vis2"] = dr.Rank(1 / 4, of="out")
ENDS = {"fash": 0.117, "lm2": 0.449, "vis2": 0.295}


@dataclass(frozen=True)
class Arm:
    """One thing that is done for the factors.

    Args:
        name: the arm's name.
        rate: multiplies the problem's learning rate.
        multiplier: multiplies the factors' learning rate alone.
        start: "truncated", "norm" (by ``initialize_factors``), "gaussian" (Gaussian
            factors of that norm), "full" (full rank, cut after a tenth of the run), or "never".
        decay: the weight decay of the low-rank weights: of their "factors" by the optimizer, of the
            "product", or "none".
        polar: before the cut, singular values shrink by this times the learning rate a step.
        teacher: after the cut, the weight of the distillation from the network before it.
    """

    name: str
    rate: float = 1.0
    multiplier: float = 1.0
    start: str = "truncated"
    decay: str = "factors"
    polar: float = 0.0
    teacher: float = 0.0


ARMS = [
    Arm("full rank", start="never"),
    Arm("low rank"),
    Arm("low rank, rate x1/2", rate=0.5),
    Arm("low rank, rate x2", rate=2),
    Arm("low rank, rate x4", rate=4),
    Arm("factors' rate x2", multiplier=2),
    Arm("norm kept", start="norm"),
    Arm("norm kept, rate x1/2", start="norm", rate=0.5),
    Arm("norm kept, rate x2", start="norm", rate=2),
    Arm("norm kept, rate x4", start="norm", rate=4),
    Arm("gaussian", start="gaussian"),
    Arm("no decay", decay="none"),
    Arm("product decay", decay="product"),
    Arm("cut", start="full"),
    Arm("cut, conditioned", start="full", polar=0.5),
    Arm("cut, distilled", start="full", teacher=0.5),
]


def train(problem: Problem, name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """Train once; costs and the test's results."""
    model = problem.model(seed).train()
    use = trace(model, problem.batch(seed, 0)[0])
    start(model, problem, arm, RANKS[name], seed)
    optimizer = problem.optimizer(model, arm.rate * problem.rate)
    rates = FactorLearningRates(model, optimizer, arm.multiplier, layers=problem.layers)
    add_decay(model, optimizer, problem, arm)
    ledger, teacher, teaching = Ledger(use, dr.current_plan(model)), None, 0.0
    cut_at = problem.steps // 10 if arm.start == "full" else problem.steps
    for step in range(problem.steps):
        if step == cut_at:
            if arm.teacher:
                teacher = frozen_copy(model)
                teaching = use.flops({}).forward / use.flops({}).training
            cut(model, optimizer, problem, ENDS[name], seed)
            ledger.turn(dr.current_plan(model))
        for group in optimizer.param_groups:
            group["lr"] = arm.rate * problem.rate * problem.factor(step)
        batch = problem.batch(seed, step)
        loss = problem.training_loss(model, batch)
        (loss if teacher is None else taught(loss, model, teacher, batch, arm.teacher)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if arm.polar and step < cut_at:
            rate = optimizer.param_groups[0]["lr"]
            shrink(model, problem, rate * arm.polar * step / cut_at)
        ledger.step()
    rates.remove()
    extra = teaching * (problem.steps - cut_at) / problem.steps
    return {"flops": ledger.relative_flops + extra, **problem.test(model, "test")}


@torch.no_grad()
def start(model: nn.Module, problem: Problem, arm: Arm, rank: dr.Rank, seed: int) -> None:
    """Bring the model to the form it starts with."""
    if arm.start in ("full", "never"):
        return
    way = dr.factorize if arm.start == "truncated" else initialize_factors
    way(model, rank, layers=problem.layers)
    if arm.start == "gaussian":
        generator = torch.Generator().manual_seed(seed)
        for site in ranked(model, problem):
            norm, factors = site.effective().norm(), site.factors()
            for factor in factors:
                factor.copy_(torch.randn(factor.shape, generator=generator) / factor.numel() ** 0.5)
            scale = (norm / site.effective().norm()) ** 0.5
            for factor in factors:
                factor.mul_(scale)


def ranked(model: nn.Module, problem: Problem) -> list[Site]:
    """The weights that change form."""
    return list(dr.survey(model, layers=problem.layers))


def add_decay(model: nn.Module, optimizer: Optimizer, problem: Problem, arm: Arm) -> None:
    """Take the low-rank weights out of the optimizer's decay, and decay their product."""
    if arm.decay == "factors":
        return
    chosen = {id(p) for s in ranked(model, problem) for p in s.factors()}
    group = next(g for g in optimizer.param_groups if any(id(p) in chosen for p in g["params"]))
    own = [p for p in group["params"] if id(p) in chosen]
    group["params"] = [p for p in group["params"] if id(p) not in chosen]
    optimizer.add_param_group({**group, "params": own, "weight_decay": 0.0})
    if arm.decay == "product":
        decay = dr.regularizers.FrobeniusDecay(model, group["weight_decay"], layers=problem.layers)
        if isinstance(optimizer, SGD):
            decay.register(optimizer)
        else:
            optimizer.register_step_pre_hook(lambda *_: decoupled(decay, model, problem, optimizer))


@torch.no_grad()
def decoupled(decay: Any, model: nn.Module, problem: Problem, optimizer: Optimizer) -> None:
    """``p <- p - lr c dR/dp``, as AdamW decays."""
    for site in ranked(model, problem):
        for p, gradient in decay.gradients(site):
            p.sub_(gradient, alpha=optimizer.param_groups[0]["lr"] * decay.coefficient)


def cut(model: nn.Module, optimizer: Optimizer, problem: Problem, flops: float, seed: int) -> None:
    """Calibrate, allocate, truncate and recalibrate BatchNorm."""
    inputs = list(problem.inputs(seed))
    known = dr.calibrate(model, inputs, layers=problem.layers)
    plan = dr.plan_within(
        model, inputs[0], flops=flops, calibration=known, layers=problem.layers, multiple_of=1
    )
    dr.apply_plan(model, plan, optimizer=optimizer, calibration=known)
    recalibrate_batch_norms(model, inputs)


@torch.no_grad()
def shrink(model: nn.Module, problem: Problem, amount: float) -> None:
    """Move every singular value of the full-rank weights down: ``W <- W - amount polar(W)``."""
    for site in ranked(model, problem):
        (weight,) = site.parameters().values()
        weight.sub_(polar(weight.flatten(1)).view_as(weight), alpha=amount)


def polar(matrix: Tensor, steps: int = 8) -> Tensor:
    """The polar factor U V' by Newton-Schulz: a quintic for all but the last two steps."""
    x = matrix / matrix.norm().clamp(min=1e-12)
    x = x.mT if len(x) > x.shape[1] else x
    for step in range(steps):
        gram = x @ x.mT
        a, b, c = (3.4445, -4.7750, 2.0315) if step < steps - 2 else (1.5, -0.5, 0.0)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if len(matrix) > matrix.shape[1] else x


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that does not train."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def taught(
    loss: Tensor, model: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor], weight: float
) -> Tensor:
    """The loss mixed with the divergence from the teacher's outputs at temperature 2."""
    x = batch[0]
    own, other = (F.log_softmax(m(x).float() / 2, -1) for m in (model, teacher))
    divergence = F.kl_div(own, other, log_target=True, reduction="none").sum(-1).mean() * 4
    return (1 - weight) * loss + weight * divergence


def main() -> None:
    """Run the arms of each problem, seed by seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("problems", nargs="+", choices=list(RANKS))
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS])
    parser.add_argument("--length", type=float, default=1.0, help="a share of the problem's steps")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = {
        "commit": commit(), "hardware": hardware(torch.device("cpu")),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    for name in given.problems:
        problem = PROBLEMS[name](given.data)
        problem.steps = round(problem.steps * given.length)
        for seed in given.seeds:
            for arm in ARMS:
                if given.arms is None or arm.name in given.arms:
                    found = train(problem, name, arm, seed)
                    what = {"problem": name, "arm": arm.name, "seed": seed, "steps": problem.steps}
                    line = {**what, **found, **{**asdict(arm), "arm": arm.name}, **place}
                    with given.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    print({**what, **found}, flush=True)


if __name__ == "__main__":
    main()
