"""A complete run, written to its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from dynarank.files.reading import sha256
from dynarank.files.sealed_json import sealed
from dynarank.records import Record, RecordWriter, SummaryRecord
from dynarank.sinks import Sink
from dynarank.surgery.verbs import merge
from dynarank.train.listener import Listener
from dynarank.train.loop import Machine, Trainer
from dynarank.train.recipes import Recipe
from dynarank.train.recorder import Recorder, header
from dynarank.train.task import Task

__all__ = ["run_schedule"]


def run_schedule(
    recipe: Recipe,
    schedule: str,
    task: Task,
    folder: Path,
    listener: Listener,
    *,
    seed: int,
    epochs: int,
    machine: Machine,
    sinks: Sequence[Sink] = (),
) -> SummaryRecord:
    """Train a recipe under a schedule; write config, records and the merged weights to ``folder``.

    Args:
        recipe: the recipe to train.
        schedule: the name of the schedule.
        task: the recipe's data, on the machine's device.
        folder: the folder of the run, created if missing.
        listener: shows the progress of the run.
        seed: the seed of the initial weights.
        epochs: the length of the run.
        machine: the device and execution options.
        sinks: logging backends that get each record too, see :func:`dynarank.sinks.open_sinks`;
            closed at the end.

    Raises:
        ValueError: the schedule is refused; nothing is written.
        DivergedError: the training loss is not finite; the records so far are kept.
    """
    trainer = Trainer(recipe, schedule, task, seed=seed, epochs=epochs, machine=machine)
    folder.mkdir(parents=True, exist_ok=True)  # a run that is refused leaves nothing behind
    _write_config(folder, recipe, schedule, task, seed=seed, epochs=epochs)
    takers: list[Sink] = [RecordWriter(folder), *sinks]

    def write(record: Record) -> None:
        for taker in takers:
            taker.write(record)

    try:
        write(header(recipe, schedule, task, machine, seed=seed, epochs=epochs))
        begun = time.perf_counter()
        recorder = Recorder(trainer, write, listener)
        recorder.begin()
        for epoch in range(epochs):
            recorder.epoch(trainer.train_epoch(epoch))
        model = merge(trainer.model)
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        digest = sha256(folder / "model.safetensors")
        return recorder.end(time.perf_counter() - begun, model_sha256=digest)
    finally:
        for taker in takers:
            taker.close()


def _write_config(
    folder: Path, recipe: Recipe, schedule: str, task: Task, *, seed: int, epochs: int
) -> None:
    config = {
        "recipe": recipe.model_dump(mode="json"),
        "schedule": schedule,
        "seed": seed,
        "epochs": epochs,
        "train_size": task.train_size,
        "data": dict(getattr(task, "facts", {})),  # for data that the recipe does not determine
    }
    text = sealed(json.dumps(config, indent=2)) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
