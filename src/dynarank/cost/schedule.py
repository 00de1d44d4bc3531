"""The predicted cost of a schedule: parameters, FLOPs and memory of each phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dynarank.cost.budget import check_request, estimated
from dynarank.cost.flops import Flops, ModelUse, share_of
from dynarank.forms import Adapted, FullRank, Plan, Within
from dynarank.schedules.base import RankSchedule, Readings, Schedule, as_schedule
from dynarank.schedules.timelines import Phase, from_step, timeline
from dynarank.schedules.total_budget import met

__all__ = ["PhaseCost", "ScheduleCost", "cost_schedule"]


@dataclass(frozen=True)
class PhaseCost:
    """The cost of one phase of a schedule.

    Args:
        phase: its steps, and what the schedule answers.
        plan: the form of each layer; for a budget, uniform ranks, which are an estimate: its ranks
            are measured at the transition, its FLOPs are known before.
        flops: the FLOPs of one batch.
        relative_forward: forward FLOPs relative to the full-rank model.
        relative_training: training FLOPs relative to the full-rank model.
        trainable_parameters: the number of trainable parameters of the model.
        total_parameters: the number of all parameters of the model.
        state_bytes: the size of parameters, gradients and optimizer state, without activations.
    """

    phase: Phase
    plan: Plan
    flops: Flops
    relative_forward: float
    relative_training: float
    trainable_parameters: int
    total_parameters: int
    state_bytes: int

    @property
    def estimated(self) -> bool:
        """Whether ranks are still to be found for a budget."""
        return any(isinstance(one, Within) for one in self.phase.plan.values())

    @property
    def adapted_costs_more(self) -> bool:
        """Whether a step of this phase with adapted layers costs more than a full-rank step."""
        adapted = any(isinstance(form, Adapted) for form in self.plan.values())
        return adapted and self.relative_training > 1


@dataclass(frozen=True)
class ScheduleCost:
    """The cost of a whole schedule; means are over steps.

    Args:
        phases: the cost of each phase.
        full_rank: the FLOPs of one batch at full rank.
    """

    phases: Sequence[PhaseCost]
    full_rank: Flops

    @property
    def steps(self) -> int:
        """The number of steps of the run."""
        return sum(cost.phase.steps for cost in self.phases)

    def at(self, step: int) -> PhaseCost:
        """The phase that contains a step."""
        return next(cost for cost in reversed(self.phases) if cost.phase.start <= step)

    @property
    def training_flops(self) -> int:
        """The training FLOPs of the whole run."""
        return sum(cost.flops.training * cost.phase.steps for cost in self.phases)

    @property
    def relative_training(self) -> float:
        """The training FLOPs of the run relative to the same run at full rank."""
        return share_of(self.training_flops, self.full_rank.training * self.steps)

    def calibration(self, batches: Callable[[int], int]) -> dict[str, Any]:
        """The cuts that are measured on batches, and what the passes of these batches cost.

        The cost is relative to the training FLOPs of the run at full rank. It is more in fact: not
        in it are the products of activations with themselves, what the decompositions compute, and
        the second pass that recalibrates BatchNorm.

        Args:
            batches: how many batches a cut at a step is measured on.

        Example:
            >>> import torch
            >>> from dynarank.cost.flops import trace
            >>> from dynarank.schedules import decay
            >>> use = trace(torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.ones(2, 64))
            >>> cost = cost_schedule(use, decay(total=0.7, cuts=[0.5]), ["0"], 100)
            >>> cost.calibration(lambda step: 8)  # 8 passes cost as much as 4 steps here
            {'cuts': 1, 'batches': 8, 'relative_flops': 0.04}
        """
        before = [self.full_rank, *(cost.flops for cost in self.phases)]
        cuts = [
            (batches(cost.phase.start), flops.forward)
            for flops, cost in zip(before, self.phases, strict=False)
            if cost.estimated
        ]
        passes = sum(number * forward for number, forward in cuts)
        return {
            "cuts": len(cuts),
            "batches": sum(number for number, _ in cuts),
            "relative_flops": share_of(passes, self.full_rank.training * self.steps),
        }

    @property
    def mean_trainable(self) -> float:
        """The number of trainable parameters, averaged over the steps."""
        return sum(c.trainable_parameters * c.phase.steps for c in self.phases) / self.steps

    @property
    def peak_trainable(self) -> int:
        """The largest number of trainable parameters of any phase."""
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
    """Predict the cost of a schedule from the trace of one batch.

    Args:
        use: the trace, from :func:`dynarank.cost.trace`.
        schedule: the schedule.
        layers: the paths of the scheduled layers.
        total_steps: the number of steps of the run.
        forecast: the learning rate, sampled at equal distances over the run, for schedules that
            follow it.
        optimizer_slots: the number of values per parameter in the optimizer's state: 1 for SGD with
            momentum, 2 for Adam.
        itemsize: bytes per value.

    Raises:
        ValueError: a budget of the schedule is below the cost of the smallest ranks.

    Example:
        >>> import torch
        >>> from dynarank.cost.flops import trace
        >>> from dynarank.schedules import low_rank
        >>> use = trace(torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.ones(2, 64))
        >>> cost_schedule(use, low_rank(16), ["0"], 10).relative_training
        0.625
    """
    shapes = {path: use.layers[path].spec.unit_shape for path in layers}
    readings = Readings(shapes, forecast=tuple(forecast), flops=use.shares(layers))
    full = use.flops(dict.fromkeys(use.layers, FullRank()))

    def phase_cost(phase: Phase) -> PhaseCost:
        with from_step(phase):
            plan, flops = estimated(use, phase.plan)
        trainable, total = use.parameters(plan)
        return PhaseCost(
            phase,
            plan,
            flops,
            share_of(flops.forward, full.forward),
            share_of(flops.training, full.training),
            trainable,
            total,
            (total + (1 + optimizer_slots) * trainable) * itemsize,
        )

    phases = phases_within(use, schedule, readings, total_steps)
    return ScheduleCost([phase_cost(phase) for phase in phases], full)


def phases_within(
    use: ModelUse, schedule: Schedule, readings: Readings, total_steps: int
) -> list[Phase]:
    """The phases of a schedule, as ``timeline`` tells them, whose budgets can be met.

    Raises:
        BudgetError: one cannot; of a total, with the smallest possible one.
    """

    def checked(schedule: RankSchedule) -> list[Phase]:
        phases = timeline(schedule, readings, total_steps)
        for phase in phases:
            with from_step(phase):
                check_request(use, phase.plan)
        return phases

    return met(as_schedule(schedule), checked)
