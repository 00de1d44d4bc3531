"""One run from start to end, written to its folder as it goes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from dynarank.records import SummaryRecord
from dynarank.sinks import Sinks, open_sinks
from dynarank.surgery import merge
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
    log: Sequence[str] = (),
) -> SummaryRecord:
    """Train a recipe under a schedule; write config, records and the merged weights to ``folder``.

    Args:
        recipe: what to train.
        schedule: the schedule's name.
        task: the recipe's data, on the machine's device.
        folder: made if it is not there.
        listener: shows the run.
        seed: of the initial weights.
        epochs: the run's length.
        machine: where and how.
        log: hosts that take the records too, see :func:`dynarank.sinks.open_sinks`.

    Raises:
        ValueError: an unknown host of ``log``, or one that cannot be opened.
        ImportError: one that is not installed.
        DivergedError: the training loss is not finite; the records up to there are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "recipe": recipe.model_dump(mode="json"),
        "schedule": schedule,
        "seed": seed,
        "epochs": epochs,
        "train_size": task.train_size,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    first = header(recipe, schedule, task, machine, seed=seed, epochs=epochs)
    sinks = Sinks(open_sinks(log, folder, first))
    try:
        sinks.write(first)
        trainer = Trainer(recipe, schedule, task, seed=seed, epochs=epochs, machine=machine)
        begun = time.perf_counter()
        recorder = Recorder(trainer, sinks.write, listener)
        recorder.begin()
        for epoch in range(epochs):
            recorder.epoch(trainer.train_epoch(epoch))
        model = merge(trainer.model)
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        return recorder.end(time.perf_counter() - begun)
    finally:
        sinks.close()
