"""Optimizers of other projects, as they are: they save optimizer memory, not FLOPs.

``pip install galore-torch apollo-torch fira`` (they need bitsandbytes and transformers). Settings
are those of their own READMEs, with a quarter of the layer's width as the rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.training.harness.arm import Arm
from benchmarks.training.problems.problem import Problem
from dynarank.cost.memory import tensor_bytes
from dynarank.factors.live_sites import LiveSites


def galore(problem: Problem, model: nn.Module, rate: float) -> Optimizer:
    """GaLore (Zhao et al., arXiv 2403.03507): Adam in the gradient's leading subspace."""
    own = {"rank": _rank(problem, model), "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return _make("galore_torch", "GaLoreAdamW", problem, model, rate, own)


def apollo(problem: Problem, model: nn.Module, rate: float) -> Optimizer:
    """APOLLO (Zhu et al., arXiv 2412.05270): channel-wise rates from a random projection."""
    own = {
        "rank": _rank(problem, model), "proj": "random", "scale_type": "channel", "scale": 1,
        "update_proj_gap": 200, "proj_type": "std",
    }  # fmt: skip
    return _make("apollo_torch", "APOLLOAdamW", problem, model, rate, own)


def fira(problem: Problem, model: nn.Module, rate: float) -> Optimizer:
    """Fira (Chen et al., arXiv 2410.01623): GaLore with the rest of the gradient, scaled."""
    own = {"rank": _rank(problem, model), "update_proj_gap": 200, "alpha": 0.25, "proj_type": "std"}
    return _make("fira", "FiraAdamW", problem, model, rate, own)


def peers(rates: tuple[float, ...] = (1.0, 2.0, 4.0)) -> list[Arm]:
    """All of them, at full rank."""
    makers: dict[str, Callable[..., Optimizer]] = {"GaLore": galore, "APOLLO": apollo, "Fira": fira}
    return [Arm(name, None, rates, optimizer=make) for name, make in makers.items()]


def own_bytes(optimizer: Optimizer) -> int:
    """The tensors that an optimizer's state holds in objects, such as GaLore's projectors."""
    held = [value for state in optimizer.state.values() for value in state.values()]
    objects = [vars(v) for v in held if hasattr(v, "__dict__") and not isinstance(v, Tensor)]
    return tensor_bytes(v for one in objects for v in one.values() if isinstance(v, Tensor))


def _rank(problem: Problem, model: nn.Module) -> int:
    sides = [min(site.effective().shape) for site in LiveSites(model, problem.layers)()]
    return max(1, min(sides) // 4)


def _make(
    package: str, name: str, problem: Problem, model: nn.Module, rate: float, own: dict[str, Any]
) -> Optimizer:
    """The package's AdamW, projecting the scheduled layers; decay and betas are the problem's."""
    try:
        cls = getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise ImportError(
            f"the arm needs the package {package.replace('_', '-')} and what it needs ({error})"
        ) from error
    usual = problem.optimizer(model, rate)
    sites = LiveSites(model, problem.layers)()
    projected = {id(p) for site in sites for p in site.parameters().values()}
    groups: list[dict[str, Any]] = []
    for group in usual.param_groups:
        settings = {"weight_decay": group["weight_decay"], "betas": group["betas"]}
        mine = [p for p in group["params"] if id(p) in projected]
        rest = [p for p in group["params"] if id(p) not in projected]
        groups += [{"params": mine, **settings, **own}] if mine else []
        groups += [{"params": rest, **settings}] if rest else []
    return cls(groups, lr=rate)
