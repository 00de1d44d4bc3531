"""The width of a full-rank network that costs a share of the whole one's FLOPs."""

from __future__ import annotations

from functools import lru_cache

import torch

from benchmarks.training.problems.problem import Problem
from dynarank.cost import trace


@lru_cache(maxsize=8)
def width_for(problem: Problem, share: float) -> float:
    """The largest width, as a factor in steps of a hundredth, that costs no more than the share.

    Raises:
        ValueError: the problem has no narrower networks, or even the narrowest costs more.
    """
    if not problem.narrowable:
        raise ValueError(f"{type(problem).__name__} has no narrower networks")
    full = flops(problem)
    for hundredth in range(99, 0, -1):
        if flops(problem, hundredth / 100) <= share * full:
            return hundredth / 100
    raise ValueError(f"no width of {type(problem).__name__} costs {share} of the FLOPs or less")


@lru_cache(maxsize=256)
def flops(problem: Problem, width: float = 1.0) -> int:
    """The training FLOPs of a step of the full-rank network of this width."""
    with torch.random.fork_rng(devices=[]):  # a run may be under way
        model = problem.model(0, width)
    return trace(model, problem.batch(0, 0)[0]).flops({}).training
