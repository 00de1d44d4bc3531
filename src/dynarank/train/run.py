"""One run from start to end, written to its folder as it goes."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections import Counter
from copy import deepcopy
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from dynarank.cost import count_flops
from dynarank.forms import Change, form_name, form_to_data
from dynarank.monitors import SpectralMonitor
from dynarank.records import (
    ChangeRecord,
    EpochRecord,
    LayerSpectrum,
    PhaseRecord,
    RecordWriter,
    RunRecord,
    SpectrumRecord,
    SummaryRecord,
)
from dynarank.surgery import merge
from dynarank.survey import current_plan
from dynarank.train.data import ImageData
from dynarank.train.loop import EpochResult, Machine, Trainer
from dynarank.train.recipes import Recipe

__all__ = ["Listener", "run_schedule"]


class Listener(Protocol):
    """Hears of a run as it goes, to show it."""

    def step(self, epochs_done: float) -> None:
        """One optimizer step is done."""

    def changed(self, epochs_done: float, changes: list[Change]) -> None:
        """Layers have changed form."""

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is over."""


def run_schedule(
    recipe: Recipe,
    schedule: str,
    data: ImageData,
    folder: Path,
    listener: Listener,
    *,
    seed: int,
    epochs: int,
    machine: Machine,
) -> SummaryRecord:
    """Train a recipe under a schedule; write config, records and the merged weights to ``folder``.

    Raises:
        DivergedError: the training loss is not finite; the records up to there are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "recipe": recipe.model_dump(mode="json"),
        "schedule": schedule,
        "seed": seed,
        "epochs": epochs,
        "train_images": len(data.train_labels),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    writer = RecordWriter(folder)
    try:
        return _Recorder(recipe, schedule, data, writer, listener, seed, epochs, machine).run(
            folder
        )
    finally:
        writer.close()


class _Recorder:
    """Runs a trainer and writes down what happens."""

    def __init__(
        self,
        recipe: Recipe,
        schedule: str,
        data: ImageData,
        writer: RecordWriter,
        listener: Listener,
        seed: int,
        epochs: int,
        machine: Machine,
    ) -> None:
        self.writer, self.listener = writer, listener
        self.trainer = trainer = Trainer(
            recipe,
            schedule,
            data,
            seed=seed,
            epochs=epochs,
            machine=machine,
            on_phase=self._phase,
            on_step=self._step,
        )
        self.monitor = SpectralMonitor(trainer.model, rank=recipe.rank, layers=recipe.layers)
        self.memory_bytes = 0
        writer.write(
            RunRecord(
                recipe=recipe.name,
                schedule=schedule,
                seed=seed,
                epochs=epochs,
                steps_per_epoch=len(trainer.batches),
                device=str(machine.device),
                hardware=_hardware(machine.device),
                precision=machine.precision,
                versions={name: version(name) for name in ("dynarank", "torch", "numpy")}
                | {"python": platform.python_version()},
                commit=_commit(),
                started=datetime.now(UTC).isoformat(timespec="milliseconds"),
            )
        )

    def run(self, folder: Path) -> SummaryRecord:
        begun = time.perf_counter()
        self._spectrum()
        accuracies: list[float] = []
        for epoch in range(self.trainer.epochs):
            record = self._epoch_record(self.trainer.train_epoch(epoch))
            accuracies.append(record.test_score)
            self.writer.write(record)
            self.listener.epoch(record)
            self._spectrum()
        model = merge(self.trainer.model)
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        summary = self._summary(accuracies, time.perf_counter() - begun)
        self.writer.write(summary)
        return summary

    def _step(self, changes: list[Change]) -> None:
        trainer = self.trainer
        self.listener.step(trainer.epochs_done)
        for change in changes:
            self.writer.write(
                ChangeRecord(
                    epoch=trainer.epochs_done,
                    step=trainer.done,
                    path=change.path,
                    before=form_to_data(change.before),
                    after=form_to_data(change.after),
                    error=change.error,
                )
            )
        if changes:
            self.listener.changed(trainer.epochs_done, changes)

    def _phase(self, peak_bytes: int) -> None:
        trainer, parameters = self.trainer, list(self.trainer.model.parameters())
        cost = trainer.cost.at(trainer.done)
        self.memory_bytes = max(self.memory_bytes, peak_bytes)
        self.writer.write(
            PhaseRecord(
                epoch=trainer.epochs_done,
                step=trainer.done,
                forms=dict(Counter(form_name(f) for f in current_plan(trainer.model).values())),
                trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
                total_parameters=sum(p.numel() for p in parameters),
                predicted_flops=cost.flops.training,
                counted_flops=_count(trainer),
                relative_flops=cost.relative_training,
                memory_bytes=peak_bytes,
            )
        )

    def _epoch_record(self, result: EpochResult) -> EpochRecord:
        trainer = self.trainer
        cost = trainer.cost.at(trainer.done - 1)
        return EpochRecord(
            epoch=trainer.epochs_done,
            step=trainer.done,
            trainable_parameters=cost.trainable_parameters,
            relative_flops=cost.relative_training,
            seconds=trainer.train_seconds,
            **vars(result),
        )

    def _spectrum(self) -> None:
        layers = {path: LayerSpectrum(**vars(r)) for path, r in self.monitor.read().items()}
        self.writer.write(
            SpectrumRecord(epoch=self.trainer.epochs_done, step=self.trainer.done, layers=layers)
        )

    def _summary(self, accuracies: list[float], wall_seconds: float) -> SummaryRecord:
        cost = self.trainer.cost
        return SummaryRecord(
            test_score=accuracies[-1],
            best_test_score=max(accuracies),
            trainable_parameters_peak=cost.peak_trainable,
            trainable_parameters_mean=cost.mean_trainable,
            training_flops=float(cost.training_flops),
            relative_flops=cost.relative_training,
            memory_bytes=self.memory_bytes,
            train_seconds=self.trainer.train_seconds,
            wall_seconds=wall_seconds,
        )


def _count(trainer: Trainer) -> int | None:
    """FLOPs of one training step as FlopCounterMode sees them, on a copy without memory."""
    if trainer.machine.compile:
        return None
    batch = trainer.data.train_images[: trainer.recipe.batch_size]
    return count_flops(deepcopy(trainer.model).to("meta"), batch.to("meta")).training


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.machine())}, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """The commit of the checkout this file is tracked in, if it is in one."""
    here = Path(__file__)
    tracked = _git("ls-files", "--error-unmatch", here.name, cwd=here.parent)
    return (
        _git("describe", "--always", "--dirty", "--abbrev=12", cwd=here.parent) if tracked else None
    )


def _git(*arguments: str, cwd: Path) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
