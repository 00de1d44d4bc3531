"""What an arm adds to the optimizer's step: an orthogonality penalty, the decay of products."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

import dynarank as dr
from benchmarks.training.harness.arm import Arm
from benchmarks.training.problems.problem import Problem
from dynarank.factors.live_sites import LiveSites

_PENALTIES = {"soft": dr.regularizers.SoftOrthogonality, "srip": dr.regularizers.SRIP}


def add_penalty(
    model: nn.Module, optimizer: Optimizer, problem: Problem, arm: Arm, coefficient: float
) -> None:
    """Register the arm's orthogonality penalty, if it has one, on the angles of the factors."""
    if arm.penalty is not None:
        penalty = _PENALTIES[arm.penalty]
        penalty(model, coefficient, layers=problem.layers, normalized=True).register(optimizer)


def decay_products(model: nn.Module, optimizer: Optimizer, problem: Problem) -> None:
    """Take the scheduled layers out of the optimizer's decay, and decay their effective weights.

    For layers that become low-rank before the first step, and stay so.
    """
    sites = LiveSites(model, problem.layers)()
    own = {id(p) for site in sites for p in site.parameters().values()}
    group = next(g for g in optimizer.param_groups if any(id(p) in own for p in g["params"]))
    moved = [p for p in group["params"] if id(p) in own]
    group["params"] = [p for p in group["params"] if id(p) not in own]
    optimizer.add_param_group({**group, "params": moved, "weight_decay": 0.0})
    decay = dr.regularizers.FrobeniusDecay(model, group["weight_decay"], layers=problem.layers)
    if isinstance(optimizer, SGD):
        decay.register(optimizer)
    else:
        optimizer.register_step_pre_hook(_Decoupled(model, problem, decay))


class _Decoupled:
    """``p <- p - lr c dR/dp`` before each step, as AdamW decays."""

    def __init__(self, model: nn.Module, problem: Problem, decay: Any) -> None:
        self.sites, self.decay = LiveSites(model, problem.layers), decay

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        amount = optimizer.param_groups[-1]["lr"] * self.decay.coefficient
        for site in self.sites():
            for p, gradient in self.decay.gradients(site):
                p.sub_(gradient, alpha=amount)
