"""What a schedule costs before anything trains: parameters, FLOPs and memory, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynarank.cost.flops import Flops, ModelUse
from dynarank.forms import Adapted, FullRank
from dynarank.schedules.base import Readings, Schedule
from dynarank.schedules.timelines import Phase, timeline

__all__ = ["PhaseCost", "ScheduleCost", "cost_schedule"]


@dataclass(frozen=True)
class PhaseCost:
    """What one phase of a schedule costs.

    Args:
        phase: its steps and plan.
        flops: FLOPs of one batch.
        relative_forward: forward FLOPs over those of the full-rank model.
        relative_training: training FLOPs over those of the full-rank model.
        trainable_parameters: of the whole model.
        total_parameters: of the whole model.
        state_bytes: parameters, gradients and optimizer state; activations come on top.
    """

    phase: Phase
    flops: Flops
    relative_forward: float
    relative_training: float
    trainable_parameters: int
    total_parameters: int
    state_bytes: int

    @property
    def adapted_costs_more(self) -> bool:
        """Whether a step of this phase with adapted layers costs more than a full-rank step."""
        adapted = any(isinstance(form, Adapted) for form in self.phase.plan.values())
        return adapted and self.relative_training > 1


@dataclass(frozen=True)
class ScheduleCost:
    """What a whole schedule costs; means are over steps.

    Args:
        phases: phase by phase.
        full_rank: FLOPs of one batch at full rank.
    """

    phases: Sequence[PhaseCost]
    full_rank: Flops

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return sum(cost.phase.steps for cost in self.phases)

    def at(self, step: int) -> PhaseCost:
        """The phase that a step belongs to."""
        return next(cost for cost in reversed(self.phases) if cost.phase.start <= step)

    @property
    def training_flops(self) -> int:
        """Of the whole run."""
        return sum(cost.flops.training * cost.phase.steps for cost in self.phases)

    @property
    def relative_training(self) -> float:
        """Training FLOPs of the run over those of the same run at full rank."""
        return self.training_flops / (self.full_rank.training * self.steps)

    @property
    def mean_trainable(self) -> float:
        """Trainable parameters, averaged over the steps."""
        return sum(c.trainable_parameters * c.phase.steps for c in self.phases) / self.steps

    @property
    def peak_trainable(self) -> int:
        """The most trainable parameters of any phase."""
        return max(cost.trainable_parameters for cost in self.phases)


def cost_schedule(
    use: ModelUse,
    schedule: Schedule,
    layers: Sequence[str],
    total_steps: int,
    *,
    forecast: Sequence[float] = (),
    optimizer_slots: int = 1,
    itemsize: int = 4,
) -> ScheduleCost:
    """Cost a schedule from the trace of one batch.

    Args:
        use: the trace, from :func:`dynarank.cost.trace`.
        schedule: the schedule.
        layers: the layers it is for.
        total_steps: steps of the run.
        forecast: the learning rate at equal distances over the run, for schedules that follow it.
        optimizer_slots: values the optimizer keeps a parameter: 1 for SGD with momentum, 2 for
            Adam.
        itemsize: bytes a value.

    Example:
        >>> import torch
        >>> from dynarank.cost.flops import trace
        >>> from dynarank.schedules import low_rank
        >>> use = trace(torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.ones(2, 64))
        >>> cost_schedule(use, low_rank(16), ["0"], 10).relative_training
        0.625
    """
    shapes = {path: use.layers[path].spec.unit_shape for path in layers}
    readings = Readings(shapes, forecast=tuple(forecast))
    full = use.flops(dict.fromkeys(use.layers, FullRank()))

    def phase_cost(phase: Phase) -> PhaseCost:
        flops = use.flops(phase.plan)
        trainable, total = use.parameters(phase.plan)
        return PhaseCost(
            phase,
            flops,
            flops.forward / full.forward,
            flops.training / full.training,
            trainable,
            total,
            (total + (1 + optimizer_slots) * trainable) * itemsize,
        )

    return ScheduleCost([phase_cost(p) for p in timeline(schedule, readings, total_steps)], full)
