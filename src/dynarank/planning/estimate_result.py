"""The result of an estimate: the cost of each phase, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynarank.cost.flops import ModelUse, share_of
from dynarank.cost.schedule import ScheduleCost
from dynarank.planning.estimate_phase import PhaseEstimate, phase_data, weight_data
from dynarank.planning.estimate_table import (
    break_even_table,
    bytes_text,
    calibration_text,
    flops_text,
    joined,
    layer_table,
    phase_table,
)
from dynarank.scheduler.last_batches import COUNT

__all__ = ["Estimate"]


@dataclass(frozen=True)
class Estimate:
    """What a run costs: ``print(found)`` shows a table, :meth:`to_dict` gives plain data.

    Args:
        model: the name of the model's class.
        schedule: the name of the schedule; None: the model as it is.
        use: the trace of the batch, from which the cost of any plan follows.
        layers: the paths of the layers shown: those of the schedule, or all that can change form.
        cost: the cost of the schedule; means are over steps.
        phases: the cost of each phase. Without a schedule there is one, the model as it is.
        optimizer: the optimizer whose state is counted.
        total_steps: the optimizer steps of the run; None: not given.
        notes: what else a reader should know.
        processes: the processes of DDP whose all-reduced bytes are shown; None: not shown.
    """

    model: str
    schedule: str | None
    use: ModelUse
    layers: tuple[str, ...]
    cost: ScheduleCost
    phases: tuple[PhaseEstimate, ...]
    optimizer: str
    total_steps: int | None
    notes: tuple[str, ...] = ()
    processes: int | None = None

    @property
    def training_flops(self) -> int:
        """The training FLOPs of the run; of one step, if it has no length."""
        return sum(one.flops.training * one.cost.phase.steps for one in self.phases)

    @property
    def relative_flops(self) -> float:
        """The training FLOPs of the run relative to the same run at full rank."""
        return share_of(self.training_flops, self.cost.full_rank.training * self.cost.steps)

    @property
    def seconds(self) -> float | None:
        """The time of all training steps of the run, if it was measured."""
        if self.total_steps is None or any(one.measured is None for one in self.phases):
            return None
        return sum(
            one.measured.seconds * one.cost.phase.steps for one in self.phases if one.measured
        )

    @property
    def calibration(self) -> dict[str, Any]:
        """What passes through the network before cuts: :meth:`ScheduleCost.calibration`.

        On the last batches that a rank scheduler keeps by itself, early in a run on as many as
        there were.
        """
        return self.cost.calibration(lambda step: max(1, min(COUNT, step)))

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain data, ready for JSON."""
        run = {} if self.total_steps is None else {"training_flops": self.training_flops}
        return {
            "model": self.model,
            "schedule": self.schedule,
            "optimizer": self.optimizer,
            "total_steps": self.total_steps,
            **run,
            "relative_training_flops": self.relative_flops,
            "full_rank_training_flops_per_step": self.cost.full_rank.training,
            "trainable_parameters_mean": self.cost.mean_trainable,
            "trainable_parameters_peak": self.cost.peak_trainable,
            "seconds": self.seconds,
            "calibration": self.calibration,
            "layers": [weight_data(path, self.use.layers[path]) for path in self.layers],
            "processes": self.processes,
            "phases": [phase_data(self.use, self.cost.full_rank, one) for one in self.phases],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        if self.schedule:
            layers = layer_table(self.use, self.layers, self.phases)
        else:
            layers = break_even_table(self.use, self.layers)
        return joined(
            f"{self.model}, {self.schedule or 'as it is'}",
            layers,
            phase_table(
                self.phases,
                self.cost.full_rank,
                spans=self.total_steps is not None,
                reduced=self.processes is not None,
            ),
            [*self._totals(), *self.notes],
        )

    def _totals(self) -> list[str]:
        cost, told = self.cost, list[str]()
        if self.total_steps is not None:
            time = "" if self.seconds is None else f", {self.seconds:,.1f} s of training steps"
            told.append(
                f"The run: {self.total_steps:,} steps, {flops_text(self.training_flops)} training "
                f"FLOPs, {self.relative_flops:.3f}x full-rank, {cost.mean_trainable:,.0f} "
                f"trainable parameters on average{time}."
            )
        told.append(f"Optimizer: {self.optimizer}.")
        sources = {one.memory.source for one in self.phases}
        how = "measured in a forward pass" if "measured" in sources else "counted on a meta copy"
        told.append(
            "Memory in bytes (K = 1024): parameters, gradients, optimizer state and activations "
            f"(what autograd saves, {how}), without workspaces. FLOPs: of a step, "
            "1 multiply-add = 2."
        )
        if self.processes is not None:
            told.append(self._reduced(self.processes))
        if extra := max(one.extra_flops for one in self.phases):
            told.append(
                f"The model reads weights of layers itself, which are then computed from their "
                f"factors: up to {flops_text(extra)} FLOPs of a step are not in the layers' rows."
            )
        if any(one.memory.optimizer is None for one in self.phases):
            told.append(
                "The optimizer cannot make a step on its own: its state is not in the total."
            )
        if any(one.cost.estimated for one in self.phases):
            told.append("Ranks with ~ are measured when their phase begins; its FLOPs are known.")
            told.append(calibration_text(self.calibration))
        return told

    def _reduced(self, processes: int) -> str:
        whole = sum(one.all_reduced_bytes for one in self.phases)
        sent = bytes_text(whole * 2 * (processes - 1) / processes)
        return (
            f"All-reduced: the gradients of {processes:,} processes with DDP; by rings each sends "
            f"{sent} {'a step' if self.total_steps is None else 'in the run'}."
        )

    __repr__ = __str__
