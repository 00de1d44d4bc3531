"""The runs of a headroom probe: a new model trains for a few steps, and its loss is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.allocation.within_budget import plan_within
from dynarank.cost.flops import ModelUse
from dynarank.decompositions import UnfitWeightError
from dynarank.forms import FullRank, LowRank, Plan, RankLike
from dynarank.layers.running import preserve_state
from dynarank.monitors.calibration import calibrate
from dynarank.planning.headroom_input import check_loss, own
from dynarank.scheduler.batch_norm import recalibrate_batch_norms
from dynarank.surgery.selection import LayerFilter, rank_for, select
from dynarank.surgery.sites import survey
from dynarank.surgery.verbs import apply_plan

__all__ = ["Kind", "Loss", "OptimizerMaker", "Probe", "Target", "find_target"]

CUT_AT = 1 / 3
"""The share of the run after which the third arm is cut."""
WARMUP = 1 / 5
"""The share of the run over which the learning rate rises; then it falls to zero, as a cosine."""
CALIBRATION = 4  # batches

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
Kind: TypeAlias = Literal["full", "low", "cut"]
OptimizerMaker: TypeAlias = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Target:
    """A rank: the plan of low rank from scratch, and its training FLOPs."""

    rank: RankLike
    plan: Plan
    decomposition: str
    flops: int
    cost: float


def find_target(
    model: nn.Module, use: ModelUse, rank: RankLike, layers: LayerFilter, decomposition: str
) -> Target:
    """The plan of low rank from scratch, checked against the model."""
    sites = select(survey(model), layers, rank, decomposition)
    if ranked := [site.path for site in sites if not isinstance(site.form, FullRank)]:
        raise ValueError(f"make_model must return a full-rank model; {ranked[0]!r} has factors")
    plan = {site.path: LowRank(rank_for(rank, site), decomposition) for site in sites}
    full, flops = use.flops({}).training, use.flops(plan).training
    if flops >= full:
        raise ValueError(
            f"rank {rank} takes {flops:,} FLOPs a step and full rank {full:,}, so there is nothing "
            "to gain; give a lower rank or other layers"
        )
    return Target(rank, plan, decomposition, flops, flops / full)


@dataclass
class Run:
    """A model in training, its optimizer, and the learning rates that this was made with."""

    model: nn.Module
    optimizer: Optimizer
    rates: list[float]
    seed: int
    factor: float
    diverged: bool = False


@dataclass
class Probe:
    """The task, and the runs on it."""

    make_model: Callable[[], nn.Module]
    loss: Loss
    make_optimizer: OptimizerMaker
    train: list[Any]
    held_out: list[Any]
    steps: int
    use: ModelUse | None = None

    def losses(self, kind: Kind, target: Target | None, seed: int, factor: float) -> Tensor:
        """Train one arm; its held-out losses, which are infinite if it diverged."""
        run = self.start(seed, factor)
        if kind == "low" and target:
            apply_plan(run.model, target.plan, optimizer=run.optimizer)
        at = max(1, round(CUT_AT * self.steps))
        self.advance(run, 0, at)
        if kind == "cut" and target:
            self.cut(run, target)
        self.advance(run, at, self.steps)
        return self.measure(run)

    def start(self, seed: int, factor: float) -> Run:
        """A new model and its optimizer."""
        torch.manual_seed(seed)
        model = self.make_model()
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"make_model must return a module, got {type(model).__name__}")
        made = self.make_optimizer([p for p in model.parameters() if p.requires_grad])
        rates = [float(group["lr"]) for group in made.param_groups]
        return Run(model.train(), made, rates, seed, factor)

    def advance(self, run: Run, start: int, stop: int) -> None:
        """Train; each step has the same batch and random draws in all arms of a seed."""
        order = _order(len(self.train), self.steps, run.seed)
        for step in range(start, stop):
            if run.diverged:
                return
            torch.manual_seed(1_000_003 * (run.seed + 1) + step)
            for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
                _set_rate(group, rate * run.factor * _shape(step, self.steps))
            value = self.loss(run.model, own(self.train[order[step]]))
            value.backward()
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.diverged = not math.isfinite(value.item())

    def cut(self, run: Run, target: Target) -> None:
        """Cut to the cost of the target, by the data."""
        if run.diverged:
            return
        some = [own(batch) for batch in self.train[:CALIBRATION]]
        paths = list(target.plan)
        try:
            known = calibrate(run.model, some, layers=paths, forward=self.loss)
            plan = plan_within(
                run.model,
                flops=target.flops,
                calibration=known,
                multiple_of=1,
                layers=paths,
                decomposition=target.decomposition,
                use=self.use,
            )
            apply_plan(run.model, plan, optimizer=run.optimizer, calibration=known)
            recalibrate_batch_norms(run.model, some, forward=self.loss)
        except UnfitWeightError:  # it diverges, though its last loss was finite
            run.diverged = True

    def measure(self, run: Run) -> Tensor:
        """The held-out losses; infinite if the run diverged."""
        diverged = torch.full((len(self.held_out),), math.inf)
        if run.diverged:
            return diverged
        with preserve_state(run.model, training=False, grad=False):
            found = torch.tensor([float(self.loss(run.model, own(b))) for b in self.held_out])
        return found if found.isfinite().all() else diverged

    def check(self) -> nn.Module:
        """A new model, whose loss and optimizer are good for training."""
        model = self.start(0, 1.0).model
        if self.make_model() is model:
            raise ValueError(
                "make_model returned the same model twice; it must build a new one at each call, "
                "such as lambda: copy.deepcopy(model)"
            )
        check_loss(self.loss(model, own(self.train[0])))
        return model


def _shape(step: int, steps: int) -> float:
    """The learning rate of a step, as a multiple of the peak: warm-up, then a cosine to zero."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _order(batches: int, steps: int, seed: int) -> list[int]:
    """The batch of each step: all of them in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps // batches)
    every = [torch.randperm(batches, generator=generator) for _ in range(epochs)]
    return torch.cat(every)[:steps].tolist()
