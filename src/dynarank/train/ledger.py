"""The cost of a run so far, from the actual forms of its layers at each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynarank.cost.flops import Flops, ModelUse
from dynarank.forms import FullRank, Plan

__all__ = ["Ledger"]

_COUNTS = (
    "steps",
    "training_flops",
    "all_reduced_bytes",
    "_trainable_steps",
    "trainable_peak",
    "last_trainable",
    "last_relative_step",
)


class Ledger:
    """Accumulates the training FLOPs and trainable parameters of a run, step by step.

    Args:
        use: the trace of one batch.
        plan: the initial forms of the layers.
        all_reduced_bytes_per_step: what a process gives to be averaged with other processes.

    Example:
        >>> import torch
        >>> from dynarank.cost.flops import trace
        >>> from dynarank.forms import LowRank
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> ledger = Ledger(trace(model, torch.ones(2, 64)), {"0": LowRank(16)})
        >>> ledger.step()
        >>> ledger.relative_flops
        0.625
    """

    def __init__(self, use: ModelUse, plan: Plan, all_reduced_bytes_per_step: int = 0) -> None:
        self._use = use
        self._full_rank = use.flops(dict.fromkeys(use.layers, FullRank()))
        self._trainable_steps = 0
        self.steps = 0
        self.training_flops = 0
        self.all_reduced_bytes = 0
        self.trainable_peak = 0
        self.flops, self.trainable = Flops(), 0
        self.last_trainable, self.last_relative_step = 0, 0.0
        self.turn(plan, all_reduced_bytes_per_step)

    def turn(self, plan: Plan, all_reduced_bytes_per_step: int = 0) -> None:
        """Use the forms of this plan for the following steps."""
        self._reduced = all_reduced_bytes_per_step
        self.flops = self._use.flops(plan)
        self.trainable, _ = self._use.parameters(plan)

    def step(self) -> None:
        """Count one training step."""
        self.steps += 1
        self.training_flops += self.flops.training
        self.all_reduced_bytes += self._reduced
        self._trainable_steps += self.trainable
        self.trainable_peak = max(self.trainable_peak, self.trainable)
        self.last_trainable, self.last_relative_step = self.trainable, self.relative_step

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {name: getattr(self, name) for name in _COUNTS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these counts."""
        for name in _COUNTS:
            setattr(self, name, state[name])

    @property
    def relative_step(self) -> float:
        """The training FLOPs of a step in the current forms relative to a full-rank step."""
        return self.flops.training / self._full_rank.training

    @property
    def relative_flops(self) -> float:
        """The training FLOPs so far relative to as many full-rank steps; 0 at the start."""
        return self.training_flops / (self._full_rank.training * max(1, self.steps))

    @property
    def trainable_mean(self) -> float:
        """The number of trainable parameters, averaged over the steps so far."""
        return self._trainable_steps / max(1, self.steps)
