"""What the phases of a recorded loop cost: FLOPs, memory, and the sum over the run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dynarank.cost.flops import Flops, ModelUse, count_flops, share_of, trace
from dynarank.cost.memory import SavedTensors, tensor_bytes
from dynarank.cost.stand_in import meta_copy, on_meta
from dynarank.forms import FullRank
from dynarank.recording.events import phase_record
from dynarank.records import EpochRecord, Metric, PhaseRecord, SummaryRecord
from dynarank.surgery.sites import current_plan, survey

__all__ = ["PhaseCosts", "alike", "summary_of"]


class PhaseCosts:
    """The cost of a training step in the forms that a model has.

    Args:
        model: the model.
        optimizers: its optimizers.
        batch: a batch; None: the last that :meth:`see` got before the first phase is asked for.
        processes: how many train the model together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        batch: Any,
        processes: int = 1,
    ) -> None:
        self.model, self.optimizers, self.processes = model, optimizers, processes
        self._batch, self._given = batch, batch is not None
        self._use: ModelUse | None = None
        self._traced_for: dict[str, bool] = {}
        self._saved = 0

    def see(self, batch: Any) -> None:
        """Keep a training batch, of which the last before the first step counts."""
        if self._use is None and not self._given:
            self._batch = batch

    def saved(self, tensors: SavedTensors) -> None:
        """Note what a forward pass saves for the backward pass."""
        self._saved = tensors.bytes_without([*self.model.parameters(), *self.model.buffers()])

    def phase(self, epoch: float, step: int) -> PhaseRecord:
        """The record of the phase that began at this step.

        Raises:
            ValueError: no batch was seen.
        """
        use, plan = self._traced(), current_plan(self.model)
        predicted = use.flops(plan).training
        full = use.flops(dict.fromkeys(use.layers, FullRank())).training
        return phase_record(
            self.model,
            plan,
            epoch=epoch,
            step=step,
            predicted_flops=predicted,
            counted_flops=self._counted(),
            relative_flops=share_of(predicted, full),
            memory_bytes=self._memory(),
            processes=self.processes,
        )

    def _traced(self) -> ModelUse:
        """The trace of the first training batch, for the layers that are trained now."""
        trained, before = self._trained(), self._traced_for
        self._traced_for = trained
        if self._use is not None and trained != before:
            with suppress(Exception):  # where no meta copy runs, it stays that of the first step
                self._use = trace(meta_copy(self.model), self._batch)
        if self._use is None:
            if self._batch is None:
                raise ValueError(
                    "no training forward pass of the model was seen before the first step, from "
                    "which FLOPs are computed (a compiled graph calls it, or another module does); "
                    "give Recorder(..., batch=...)"
                )
            try:  # without a second copy of the values
                self._use = trace(meta_copy(self.model), on_meta(self._batch))
            except Exception:  # whatever the model does that meta tensors do not allow
                self._use = trace(self.model, self._batch)
            self._batch = on_meta(self._batch)  # its shapes are all that is needed from now on
        return self._use

    def _trained(self) -> dict[str, bool]:
        """Which layers are trained: what is frozen needs no gradient of its weight."""
        return {
            site.path: any(p.requires_grad for p in site.parameters().values())
            for site in survey(self.model)
            if site.form is not None
        }

    def _counted(self) -> int | None:
        """The FLOPs of a step by FlopCounterMode; None where no meta copy runs."""
        try:
            found: Flops = count_flops(meta_copy(self.model), self._batch)
        except Exception:  # whatever the model does that meta tensors do not allow
            return None
        return found.training

    def _memory(self) -> int:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        parameters = list(self.model.parameters())
        states = (state for one in self.optimizers for state in one.state.values())
        tensors = [v for state in states for v in state.values() if torch.is_tensor(v)]
        trained = [p for p in parameters if p.requires_grad]
        held = tensor_bytes([*parameters, *self.model.buffers(), *trained, *tensors])
        return held + self._saved


def alike(one: PhaseRecord, other: PhaseRecord) -> bool:
    """Whether two records are of one phase."""
    names = ("forms", "trainable_parameters", "total_parameters", "predicted_flops")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def summary_of(
    phases: Sequence[PhaseRecord],
    step: int,
    results: Sequence[EpochRecord],
    metric: Metric,
    *,
    train_seconds: float,
    wall_seconds: float,
    model_sha256: str | None,
) -> SummaryRecord:
    """The summary of a run that ends after this step: costs from its phases, and its scores."""
    stops = [*(phase.step for phase in phases[1:]), step]
    spans = [(p, stop - p.step) for p, stop in zip(phases, stops, strict=True)]
    steps = max(1, sum(steps for _, steps in spans))
    scores = [s for r in results if (s := r.test_score) is not None]
    best = max if metric.higher_is_better else min
    return SummaryRecord(
        test_score=scores[-1] if scores else None,
        best_test_score=best(scores) if scores else None,
        scores=results[-1].scores if results else {},
        trainable_parameters_peak=max(p.trainable_parameters for p in phases),
        trainable_parameters_mean=sum(p.trainable_parameters * n for p, n in spans) / steps,
        training_flops=float(sum(p.predicted_flops * n for p, n in spans)),
        relative_flops=sum(p.relative_flops * n for p, n in spans) / steps,
        memory_bytes=max(p.memory_bytes or 0 for p in phases),
        all_reduced_bytes=sum(p.all_reduced_bytes_per_step * n for p, n in spans),
        train_seconds=train_seconds,
        wall_seconds=wall_seconds,
        model_sha256=model_sha256,
    )
