"""A run that is stopped anywhere and goes on is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import Silent

from dynarank.checkpoint.folder import read_folder
from dynarank.records import ChangeRecord, SummaryRecord, read_run
from dynarank.train.bert import BERT
from dynarank.train.bilstm import BiLSTM
from dynarank.train.data import limit, limit_test, load_digits_data
from dynarank.train.images import ImageTask
from dynarank.train.interruption import Interrupted
from dynarank.train.language_task import LanguageModelTask
from dynarank.train.loop import Machine
from dynarank.train.recipes import Recipe, load_recipe
from dynarank.train.run import CheckpointPlan, run_schedule
from dynarank.train.run_checkpoints import RunCheckpoints
from dynarank.train.sentence_task import ACCURACY, ClassificationTask, Examples
from dynarank.train.task import Task
from dynarank.train.text_files import TextData

CPU = torch.device("cpu")
EPOCHS = 3
TIMES = {"seconds", "train_seconds", "wall_seconds", "started", "commit"}
EVERY_STEP = CheckpointPlan(minutes=0, keep=1000)
STOPPED = CheckpointPlan(minutes=None)


def recipe(name: str, **changes: Any) -> Recipe:
    return Recipe.model_validate({**load_recipe(name).model_dump(), **changes})


def digits(**changes: Any) -> tuple[Recipe, Task]:
    made = recipe("digits", **changes)
    data = limit_test(limit(load_digits_data(), 320), 60)
    return made, ImageTask(made, data, seed=0)


def small_transformer(dropout: float = 0.1) -> dict[str, Any]:
    return {"width": 32, "depth": 1, "heads": 2, "dropout": dropout}


def gpt(**changes: Any) -> tuple[Recipe, Task]:
    options = {"batch_size": 8, "rank": 4, "model_options": small_transformer()}
    made = recipe("text-gpt", data_options={"context": 16}, **options, **changes)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 256, (1200,), generator=generator, dtype=torch.uint8)
    data = TextData(text[:900], text[900:], 1, "random")
    return made, LanguageModelTask(made, data, context=16, seed=0, train_limit=40)


def sentences(name: str, build: Callable[[], torch.nn.Module], inputs: int) -> tuple[Recipe, Task]:
    made = recipe(name, batch_size=8, rank=4)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 20, (40, 6), generator=generator)
    labels = words[:, 0] % 2
    many = Examples((words, torch.zeros_like(words))[:inputs], labels)
    return made, ClassificationTask(made, many, many, build, [ACCURACY], seed=0)


def bert() -> tuple[Recipe, Task]:
    build = partial(BERT, vocabulary=20, length=6, outputs=2, **small_transformer())
    return sentences("glue-sst2", build, 2)


def lstm() -> tuple[Recipe, Task]:
    return sentences("imdb-lstm", partial(BiLSTM, 20, 2, width=16, hidden=16, dropout=0.3), 1)


AUGMENTED: dict[str, Any] = {"augment": True, "rewarmup": 4, "label_smoothing": 0.1}
CASES: dict[str, tuple[Callable[[], tuple[Recipe, Task]], str, bool]] = {
    "images": (partial(digits, **AUGMENTED), "dynamic-rank", True),
    "adapters": (partial(digits, shuffle="once", optimizer="adamw"), "dynamic-rank-low", False),
    "closed loop": (partial(digits, lr_schedule="cosine"), "closed-loop", False),
    "low-rank": (partial(digits, init="published"), "low-rank", False),
    "gpt": (gpt, "dynamic-rank", True),
    "gpt, calibrated": (partial(gpt, moments="calibrated"), "dynamic-rank", False),
    "bert": (bert, "dynamic-rank", False),
    "lstm": (lstm, "dynamic-rank", False),
}


class Case:
    """A small run that can be started again and again."""

    def __init__(self, name: str, folder: Path) -> None:
        make, self.schedule, noise = CASES[name]
        self.recipe, self.task = make()
        self.machine = Machine(CPU, noise=noise)
        self.folder = folder
        self.steps = EPOCHS * self.task.steps_per_epoch

    def run(self, folder: Path | None = None, **options: Any) -> SummaryRecord:
        settings = {"seed": 0, "epochs": EPOCHS, "machine": self.machine, "say": print, **options}
        place, listener = folder or self.folder, options.pop("listener", Silent())
        settings.pop("listener", None)
        return run_schedule(self.recipe, self.schedule, self.task, place, listener, **settings)

    def stop_at(self, step: int, **options: Any) -> None:
        calls = Stop(step, self.folder)
        with pytest.raises(Interrupted) as stopped:
            self.run(stop=calls, **options)
        assert (stopped.value.step, stopped.value.exit_code) == (step, 130)


class Stop:
    """Asks to stop after a step of the run, however many of them were done before."""

    def __init__(self, step: int, folder: Path) -> None:
        saved = sorted((folder / "checkpoints").glob("step-????????"))
        self.left = step - (int(saved[-1].name[-8:]) if saved else 0)

    def __call__(self) -> int | None:
        self.left -= 1
        return signal.SIGINT if self.left == 0 else None


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def state(folder: Path, step: int) -> dict[str, Any]:
    """All that a checkpoint holds, but for times."""
    contents = read_folder(folder / "checkpoints" / f"step-{step:08d}")
    data: dict[str, Any] = json.loads(json.dumps(contents.data))
    extra = data["extra"]
    del extra["wall_seconds"], extra["records"], extra["trainer"]["train_seconds"]
    tensors = {f"{f} {k}": v for f, part in contents.tensors.items() for k, v in part.items()}
    return {"data": data, **tensors}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    for key, value in one.items():
        twin = other[key]
        if isinstance(value, Tensor):
            if value.dtype != twin.dtype or not torch.equal(value, twin):
                return False
        elif value != twin:
            return False
    return True


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path / "stopped")


def test_stopped_after_every_step(case: Case, tmp_path: Path, monkeypatch: Any) -> None:
    """Each step is made by another trainer; every state on the way is the same."""
    monkeypatch.setattr(RunCheckpoints, "remove", RunCheckpoints.close)
    whole = tmp_path / "whole"
    case.run(whole, checkpoints=EVERY_STEP)
    states = [state(whole, step) for step in range(1, case.steps + 1)]
    for step in range(1, case.steps + 1):
        case.stop_at(step, checkpoints=CheckpointPlan(minutes=None, keep=1000))
        assert same(state(case.folder, step), states[step - 1]), step
        assert step == 1 or not same(states[step - 2], states[step - 1])
    case.run()
    assert records(case.folder) == records(whole)
    models = [(folder / "model.safetensors").read_bytes() for folder in (case.folder, whole)]
    assert models[0] == models[1]
    if case.schedule != "low-rank":
        assert len({record.step for record in read_run(whole).all(ChangeRecord)}) > 1
