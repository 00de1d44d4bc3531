"""How long a full-rank step takes meanwhile: the speed of a shared machine changes.

A few steps of a second, full-rank network are timed at each look at the run. So the seconds of a
run are compared with those that full rank would have taken then, not with a run of another hour.
"""

from __future__ import annotations

import time
from functools import cached_property

import torch

from benchmarks.training.problems.problem import Problem

_STEPS = 16
"""Timed steps of a run."""


class Pace:
    """Times steps of a full-rank network that does not learn.

    Args:
        problem: the problem.
        seed: of the network and its batches.
        points: how often it is measured in a run.
    """

    def __init__(self, problem: Problem, seed: int, points: int) -> None:
        self.problem, self.seed, self.steps = problem, seed, -(-_STEPS // points)

    def measure(self) -> list[float]:
        """The CPU seconds of a few steps, after one to warm up; random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            self._step(0)
            return [self._step(i + 1) for i in range(self.steps)]

    @cached_property
    def _network(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = self.problem.model(self.seed)
        return model, self.problem.optimizer(model, 0.0)

    def _step(self, step: int) -> float:
        model, optimizer = self._network
        batch = self.problem.batch(self.seed, step)
        begun = time.process_time()
        self.problem.backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - begun
