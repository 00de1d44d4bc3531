"""The recorder of a run, which writes records while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from dynarank.cost.flops import count_flops
from dynarank.distributed.processes import Processes
from dynarank.forms import Change
from dynarank.monitors.spectral import SpectralMonitor
from dynarank.recording.events import RankEvents, phase_record
from dynarank.recording.host import commit, hardware, started, versions
from dynarank.recording.rank_metrics import PICTURES, VALUES, RankMetricsRecorder, evenly
from dynarank.records import (
    EpochRecord,
    Record,
    RunRecord,
    SummaryRecord,
)
from dynarank.train.listener import Listener, Progress
from dynarank.train.loop import EpochResult, Machine, Trainer
from dynarank.train.noise import NoiseRecorder
from dynarank.train.recipe import Recipe
from dynarank.train.task import Task

__all__ = ["Recorder", "header"]

_ALONE = Processes()


def header(
    recipe: Recipe,
    schedule: str,
    task: Task,
    machine: Machine,
    *,
    seed: int,
    epochs: int,
    processes: Processes = _ALONE,
) -> RunRecord:
    """The first record of a run: its settings and its machine."""
    return RunRecord(
        recipe=recipe.name,
        schedule=schedule,
        seed=seed,
        epochs=epochs,
        steps_per_epoch=task.steps_per_epoch,
        device=str(machine.device),
        hardware=hardware(machine.device),
        precision=machine.precision,
        metric=task.metric,
        versions=versions(),
        commit=commit(),
        started=started(),
        processes=processes.size,
        backend=processes.backend(machine.device),
    )


class Recorder:
    """Turns the events of a trainer into records.

    Args:
        trainer: the trainer of the run.
        write: called with each record.
        listener: shows the progress of the run.
    """

    def __init__(
        self, trainer: Trainer, write: Callable[[Record], None], listener: Listener
    ) -> None:
        self.trainer, self.write, self.listener = trainer, write, listener
        trainer.on_phase, trainer.on_step = self._phase, self.step
        self.rank_metrics = self._rank_metrics()
        self.events = RankEvents(write, lambda step: step / trainer.task.steps_per_epoch)
        self.noise = NoiseRecorder(trainer, write) if trainer.machine.noise else None
        self.memory_bytes = 0
        self._results: list[EpochResult] = []
        self._picture_epochs = frozenset(evenly(range(trainer.epochs + 1), PICTURES))

    def _rank_metrics(self) -> RankMetricsRecorder:
        trainer, recipe = self.trainer, self.trainer.recipe
        monitor = SpectralMonitor(
            trainer.model, rank=recipe.rank, layers=recipe.layers, updates=True, values=VALUES
        )

        def now() -> tuple[float, int]:
            return trainer.epochs_done, trainer.done

        layers = trainer.ranks.layers
        return RankMetricsRecorder(trainer.model, monitor, layers, self.write, now)

    def _read(self, epoch: int) -> None:
        self.rank_metrics.read(pictures=epoch in self._picture_epochs)

    def begin(self) -> None:
        """Record the initial weights."""
        self._decided()
        self._read(0)

    @property
    def epochs(self) -> int:
        """The number of epochs recorded."""
        return len(self._results)

    def state_dict(self) -> dict[str, Any]:
        """What the records to come depend on."""
        return {
            "memory_bytes": self.memory_bytes,
            "results": [dict(vars(result)) for result in self._results],
            "rank_metrics": self.rank_metrics.monitor.state_dict(),
            "noise": None if self.noise is None else self.noise.monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another recorder was; the trainer's state is loaded before."""
        self.memory_bytes = state["memory_bytes"]
        self._results = [EpochResult(**result) for result in state["results"]]
        self.events.known = len(self.trainer.ranks.decisions)
        self.rank_metrics.monitor.load_state_dict(state["rank_metrics"])
        if self.noise is not None:
            self.noise.monitor.load_state_dict(state["noise"])

    def epoch(self, result: EpochResult) -> None:
        """Record the results of an epoch, and the weights after it."""
        trainer = self.trainer
        self._results.append(result)
        record = EpochRecord(
            epoch=trainer.epochs_done,
            step=trainer.done,
            trainable_parameters=trainer.ledger.last_trainable,
            relative_flops=trainer.ledger.last_relative_step,
            seconds=trainer.train_seconds,
            **vars(result),
        )
        self.write(record)
        self.listener.epoch(record)
        self._read(len(self._results))
        if self.noise is not None:
            self.noise.read(len(self._results))

    def end(self, wall_seconds: float, model_sha256: str | None = None) -> SummaryRecord:
        """Record and return the summary of the run, with the digest of its weights' file."""
        ledger, metric = self.trainer.ledger, self.trainer.task.metric
        scores = [result.test_score for result in self._results]
        summary = SummaryRecord(
            test_score=scores[-1],
            best_test_score=max(scores) if metric.higher_is_better else min(scores),
            scores=self._results[-1].scores,
            trainable_parameters_peak=ledger.trainable_peak,
            trainable_parameters_mean=ledger.trainable_mean,
            training_flops=float(ledger.training_flops),
            relative_flops=ledger.relative_flops,
            memory_bytes=self.memory_bytes,
            all_reduced_bytes=ledger.all_reduced_bytes,
            train_seconds=self.trainer.train_seconds,
            wall_seconds=wall_seconds,
            model_sha256=model_sha256,
        )
        self.write(summary)
        return summary

    def step(self, changes: list[Change]) -> None:
        """Record a step's decisions and changes of form."""
        trainer = self.trainer
        self.listener.step(
            Progress(
                trainer.epochs_done,
                trainer.done,
                trainer.total_steps,
                trainer.phase,
                trainer.share_full_rank,
                trainer.ledger.relative_flops,
                trainer.learning_rate,
            )
        )
        self._decided()
        self.events.changed(trainer.done, changes)
        if changes:
            self.listener.changed(trainer.epochs_done, changes)

    def _decided(self) -> None:
        """Record the schedule's readings and decisions since the last step."""
        self.rank_metrics.decided_by(self.trainer.ranks.spectra)
        self.events.decided(self.trainer.ranks.decisions)

    def _phase(self, peak_bytes: int) -> None:
        trainer = self.trainer
        self.memory_bytes = max(self.memory_bytes, peak_bytes)
        self.write(
            phase_record(
                trainer.model,
                trainer.plan,
                epoch=trainer.epochs_done,
                step=trainer.done,
                predicted_flops=trainer.ledger.flops.training,
                counted_flops=_count(trainer),
                relative_flops=trainer.ledger.relative_step,
                memory_bytes=peak_bytes,
                processes=trainer.processes.size,
            )
        )


def _count(trainer: Trainer) -> int | None:
    """The FLOPs of one training step by FlopCounterMode, on a meta copy."""
    if trainer.machine.compile:
        return None
    sample = tree_map_only(torch.Tensor, lambda x: x.to("meta"), trainer.task.sample())
    try:
        return count_flops(deepcopy(trainer.model).to("meta"), sample).training
    except RuntimeError:  # its forward pass reads values, which are not there
        return None
