"""A run that is stopped anywhere and goes on is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import some
from torch import Tensor
from torch.utils import _pytree
from training import Silent
from warm_python import run

from dynarank.checkpoint.folder import Contents, read_folder
from dynarank.files.reading import DamagedFileError
from dynarank.records import ChangeRecord, RecordWriter, SummaryRecord, read_run
from dynarank.train.bert import BERT
from dynarank.train.bilstm import BiLSTM
from dynarank.train.data import limit, limit_test, load_digits_data
from dynarank.train.images import ImageTask
from dynarank.train.interruption import Interrupted
from dynarank.train.language_task import LanguageModelTask
from dynarank.train.loop import DivergedError, Machine, Trainer
from dynarank.train.recipes import Recipe, RecipeError, load_recipe
from dynarank.train.run import CheckpointPlan, run_schedule
from dynarank.train.run_checkpoints import RunCheckpoints
from dynarank.train.sentence_task import ACCURACY, ClassificationTask, Examples
from dynarank.train.task import Task
from dynarank.train.text_files import TextData

CPU = torch.device("cpu")
EPOCHS = 3
TIMES = {"crc", "seconds", "train_seconds", "wall_seconds", "started", "commit"}
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
    "gpt, decay": (gpt, "decay", False),
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
        settings: dict[str, Any] = {"seed": 0, "epochs": EPOCHS, "machine": self.machine}
        settings |= options
        place, listener = folder or self.folder, settings.pop("listener", Silent())
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


_FEW = ("images", "gpt, calibrated", "gpt, decay", "lstm")


@pytest.fixture(params=some(_FEW, [name for name in CASES if name not in _FEW]))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path / "stopped")


def test_stopped_after_every_step(case: Case, tmp_path: Path, monkeypatch: Any) -> None:
    """Each step is made by another trainer; every state on the way is the same."""
    monkeypatch.setattr(RunCheckpoints, "remove", RunCheckpoints.close)
    whole = tmp_path / "whole"
    case.run(whole, checkpoints=EVERY_STEP)
    states = [state(whole, step) for step in range(1, case.steps + 1)]
    for step in range(1, case.steps + 1):
        case.stop_at(step, checkpoints=STOPPED)
        assert same(state(case.folder, step), states[step - 1]), step
        assert step == 1 or not same(states[step - 2], states[step - 1])
    case.run()
    assert records(case.folder) == records(whole)
    models = [(folder / "model.safetensors").read_bytes() for folder in (case.folder, whole)]
    assert models[0] == models[1]
    if case.schedule != "low-rank":
        assert len({record.step for record in read_run(whole).all(ChangeRecord)}) > 1


class Broken(RuntimeError):
    pass


class BreaksAt(Silent):
    """A listener that raises at a step, as a fault in the middle of training does."""

    def __init__(self, at: int, error: Callable[[], BaseException] = Broken) -> None:
        self.at, self.error = at, error

    def step(self, progress: Any) -> None:
        if progress.step == self.at:
            raise self.error()


@pytest.mark.parametrize("name", ["images", "gpt"])
def test_broken_after_the_last_checkpoint(name: str, tmp_path: Path) -> None:
    """Records that were written after the checkpoint are cut off, a torn line included."""
    case = Case(name, tmp_path / "broken")
    case.run(tmp_path / "whole")
    case.stop_at(3, checkpoints=STOPPED)
    for at in (5, 6, case.steps - 4, case.steps):
        with pytest.raises(Broken):
            case.run(listener=BreaksAt(at), checkpoints=STOPPED)
        with (case.folder / "records.jsonl").open("ab") as file:
            file.write(b'{"kind":"epo' * 10_000)
    case.run()
    assert records(case.folder) == records(tmp_path / "whole")
    models = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("broken", "whole")]
    assert models[0] == models[1]


def test_a_run_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    case = Case("images", tmp_path / "broken")
    case.run(tmp_path / "whole")
    with pytest.raises(Broken):
        case.run(listener=BreaksAt(8), checkpoints=STOPPED)
    case.run()
    assert records(case.folder) == records(tmp_path / "whole")


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    case = Case("low-rank", tmp_path / "run")
    summary = case.run(checkpoints=EVERY_STEP)
    assert not (case.folder / "checkpoints").exists()
    before = {path.name: path.read_bytes() for path in case.folder.iterdir()}
    said: list[str] = []
    assert case.run(say=said.append) == summary
    assert "finished already" in said[0]
    assert {path.name: path.read_bytes() for path in case.folder.iterdir()} == before


def test_another_run_is_refused(tmp_path: Path) -> None:
    case = Case("low-rank", tmp_path / "run")
    case.stop_at(2)
    before = sorted(case.folder.rglob("*"))
    others: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"epochs": 4}, "epochs: 3 there, 4 now"),
        ({"machine": Machine(CPU, precision="bf16")}, "precision: fp32 there, bf16 now"),
        ({"machine": Machine(CPU, noise=True)}, "noise: False there, True now"),
    ]
    for options, told in others:
        with pytest.raises(RecipeError, match=told):
            case.run(**options)
    images = case.task.data.train_images  # type: ignore[attr-defined]
    images[0, 0, 0, 0] += 1
    other = Case("low-rank", case.folder)
    other.task.data.train_images[0, 0, 0, 0] += 1  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="data_digest"):
        other.run()
    assert sorted(case.folder.rglob("*")) == before


def test_wall_seconds_add_up(tmp_path: Path) -> None:
    case = Case("low-rank", tmp_path / "run")
    case.stop_at(2)
    saved = read_folder(case.folder / "checkpoints" / "step-00000002").data["extra"]
    begun = time.perf_counter()
    summary = case.run()
    here = time.perf_counter() - begun
    assert saved["wall_seconds"] < summary.wall_seconds < saved["wall_seconds"] + here
    assert summary.train_seconds > saved["trainer"]["train_seconds"]


def test_a_damaged_checkpoint_is_set_aside(tmp_path: Path) -> None:
    case = Case("images", tmp_path / "run")
    case.run(tmp_path / "whole")
    case.stop_at(4, checkpoints=EVERY_STEP)
    newest = case.folder / "checkpoints" / "step-00000004" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    said: list[str] = []
    case.run(say=said.append)
    assert any("damaged" in text for text in said) and any("step 3 of" in text for text in said)
    assert records(case.folder) == records(tmp_path / "whole")


def test_changed_records_are_refused(tmp_path: Path) -> None:
    case = Case("low-rank", tmp_path / "run")
    case.stop_at(4)
    path = case.folder / "records.jsonl"
    data = path.read_bytes()
    for changed in (data.replace(b"digits", b"digitz"), data[: len(data) // 2]):
        path.write_bytes(changed)
        with pytest.raises(DamagedFileError, match=r"records\.jsonl"):
            case.run()
        assert path.read_bytes() == changed
    path.unlink()
    with pytest.raises(DamagedFileError, match="it is missing; put the file back"):
        case.run()
    path.write_bytes(data)
    case.run()


def test_a_full_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is kept, and the same call writes the model without training again."""
    case = Case("images", tmp_path / "run")
    case.run(tmp_path / "whole")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynarank.train.trained.save_tensors", full)
    with pytest.raises(OSError, match=f"state of step {case.steps} is saved; make room"):
        case.run(checkpoints=STOPPED)
    monkeypatch.undo()
    case.run(listener=BreaksAt(case.steps))
    assert records(case.folder) == records(tmp_path / "whole")
    model = (case.folder / "model.safetensors").read_bytes()
    assert model == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_full_disk_in_between_ends_no_run_and_loses_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records wait in memory, and no checkpoint is written that counts on them."""
    case = Case("low-rank", tmp_path / "run")
    case.run(tmp_path / "whole")
    write, said, calls = RecordWriter.write, list[str](), list[int]()

    def full(writer: RecordWriter, record: Any) -> None:
        calls.append(0)
        if 3 < len(calls) < 7:
            raise OSError(28, "No space left on device")
        write(writer, record)

    monkeypatch.setattr(RecordWriter, "write", full)
    case.run(say=said.append, checkpoints=EVERY_STEP)
    assert sum("cannot be written (No space left" in text for text in said) == 1
    assert any("could not be saved" in text for text in said)
    assert records(case.folder) == records(tmp_path / "whole")


def test_a_diverged_run_keeps_its_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    case = Case("low-rank", tmp_path / "run")
    case.stop_at(6)

    def diverge(self: Trainer, epoch: int) -> None:
        raise DivergedError("nan")

    monkeypatch.setattr(Trainer, "train_epoch", diverge)
    with pytest.raises(DivergedError):
        case.run()
    monkeypatch.undo()
    assert (case.folder / "checkpoints" / "step-00000006").exists()
    case.run(tmp_path / "whole")
    case.run()
    assert records(case.folder) == records(tmp_path / "whole")


@pytest.mark.parametrize("name", ["images", "gpt", "bert"])
def test_an_epoch_begins_at_any_batch(name: str, tmp_path: Path) -> None:
    task = Case(name, tmp_path).task
    whole = list(task.epoch(1))
    for start in range(len(whole) + 1):
        rest = list(task.epoch(1, start))
        assert len(rest) == len(whole) - start
        for one, other in zip(rest, whole[start:], strict=True):
            flat = [vars(b) if isinstance(b, Examples) else b for b in (one, other)]
            assert same(leaves(flat[0]), leaves(flat[1]))


def leaves(batch: Any) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(_pytree.tree_leaves(batch))}


class Plan:
    """Checkpoints with a clock of their own, and what they wrote."""

    def __init__(self, folder: Path, plan: CheckpointPlan) -> None:
        self.now, self.taken = 0.0, list[int]()
        self.step = 0
        self.made = RunCheckpoints(folder, plan, print, self.take, lambda: self.now)

    def take(self) -> Contents:
        self.taken.append(self.step)
        self.now += 1.0  # so long takes a checkpoint, whenever the writer's thread is done
        return Contents(data={"state": {}})

    def at(self, now: float, *, event: bool = False) -> None:
        self.now, self.step = now, self.step + 1
        if self.made.due(event=event):
            self.made.save(self.step)
        self.made.close()


def test_when_a_checkpoint_is_due(tmp_path: Path) -> None:
    run = Plan(tmp_path, CheckpointPlan(minutes=1))
    for second in range(1, 131):
        run.at(second)
    assert run.taken == [60, 120]
    events = Plan(tmp_path / "b", CheckpointPlan(minutes=1))
    for second in range(1, 31):
        events.at(second, event=True)
    assert events.taken[0] == 1 and len(events.taken) < 3  # each is as long as a step
    never = Plan(tmp_path / "c", CheckpointPlan(minutes=None))
    never.at(1e6, event=True)
    assert not never.taken and not (tmp_path / "c").exists()


def test_only_checkpoints_are_removed_at_the_end(tmp_path: Path) -> None:
    taken = Contents(data={"state": {}})
    checkpoints = RunCheckpoints(tmp_path, CheckpointPlan(), print, lambda: taken)
    checkpoints.save(3, wait=True)
    kept = {"step-00000003.copy1", "step-00000003-2", "step-00000003.damaged-2"}
    for name in kept:
        shutil.copytree(tmp_path / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / name)
    checkpoints.remove()
    assert set(os.listdir(tmp_path / "checkpoints")) == kept


def test_a_checkpoint_of_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    recipe, task = digits()
    machine = Machine(torch.device("cpu"))
    checkpoints = RunCheckpoints(
        tmp_path, CheckpointPlan(), print, lambda: Contents(data={"state": {}})
    )
    checkpoints.save(1, wait=True)
    with pytest.raises(ValueError, match="is not one of this run"):
        run_schedule(
            recipe, "low-rank", task, tmp_path, Silent(), seed=0, epochs=30, machine=machine
        )


def test_no_such_plan() -> None:
    for options in ({"minutes": -1.0}, {"minutes": float("nan")}, {"keep": 1}, {"share": 0.0}):
        with pytest.raises(ValueError):
            CheckpointPlan(**options)  # type: ignore[arg-type]


RUN = """
import os, signal, sys
from pathlib import Path
from test_resume_run import CASES, Case, EVERY_STEP
from dynarank.train.interruption import Interrupted, StopSignals
case = Case("images", Path(sys.argv[1]))
seen = 0
def ask():
    global seen
    seen += 1
    if len(sys.argv) > 2 and seen == 4:
        os.kill(os.getpid(), int(sys.argv[2]))
    return stop.requested()
try:
    with StopSignals() as stop:
        case.run(checkpoints=EVERY_STEP, stop=ask)
except Interrupted as stopped:
    sys.exit(stopped.exit_code)
"""


def in_a_process(folder: Path, *signals: int) -> int:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    path = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return run(["-c", RUN, str(folder), *map(str, signals)], env=environment).returncode


def test_real_signals(tmp_path: Path) -> None:
    case = Case("images", tmp_path / "run")
    codes = [in_a_process(case.folder, n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)]
    assert codes == [143, 130, -9]
    assert in_a_process(case.folder) == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        case.run(tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert records(case.folder) == records(tmp_path / "whole")
    model = (case.folder / "model.safetensors").read_bytes()
    assert model == (tmp_path / "whole" / "model.safetensors").read_bytes()
