"""The job runner of ``train``, ``compare`` and ``sweep``: it trains jobs one after another."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from dynarank.cli.interruption import GoOn
from dynarank.cli.processes import Order, leader
from dynarank.cli.progress import ProgressListener
from dynarank.distributed.processes import Processes, independent
from dynarank.files.json_data import DamagedFileError
from dynarank.files.ownership import move_aside, owned
from dynarank.files.volume import FULL_DISK
from dynarank.records import Run, find_runs
from dynarank.report import write_report
from dynarank.report.formats import plural
from dynarank.sinks import open_sinks
from dynarank.sinks.extras import install_command
from dynarank.train.checkpoint_plan import CheckpointPlan
from dynarank.train.data_digest import data_digest
from dynarank.train.grid import (
    COMMON,
    Job,
    check_folder,
    find,
    is_ours,
    open_folder,
    read_common,
    run_jobs,
)
from dynarank.train.interruption import Interrupted, StopSignals
from dynarank.train.loop import DivergedError, Machine
from dynarank.train.recipes import Recipe, RecipeError
from dynarank.train.run import run_schedule
from dynarank.train.schedules import check_schedules
from dynarank.train.task import Task
from dynarank.train.tasks import make_task

__all__ = ["JobRunner", "not_writable"]


@dataclass
class JobRunner:
    """Runs jobs one after another on one machine, in a folder that it owns.

    Args:
        command: the command, such as ``compare``.
        terminal: where progress is shown.
        machine: device and precision.
        data: where the data set is.
        epochs: the length of each run.
        train_limit: number of training examples; None: all.
        test_limit: number of test examples; None: all.
        checkpoints: when checkpoints are written.
        backends: the logging backends.
    """

    command: str
    terminal: Console
    machine: Machine
    data: str | None
    epochs: int
    train_limit: int | None
    test_limit: int | None
    checkpoints: CheckpointPlan = field(default_factory=CheckpointPlan)
    backends: Sequence[str] = ()
    diverged: dict[Path, DivergedError] = field(default_factory=dict[Path, DivergedError])
    finished_before: list[Job] = field(default_factory=list[Job])
    resumed: list[Job] = field(default_factory=list[Job])
    _settings: dict[str, Any] = field(default_factory=dict[str, Any])
    _tasks: dict[int, Task] = field(default_factory=dict[int, Task])
    _checked: set[tuple[int, str]] = field(default_factory=set[tuple[int, str]])
    _disk_error: OSError | None = None

    def common(self, recipe: Recipe, **more: Any) -> dict[str, Any]:
        """The settings that all runs of a folder share."""
        return {
            "command": self.command,
            "recipe": recipe.model_dump(mode="json"),
            "epochs": self.epochs,
            "train_limit": self.train_limit,
            "test_limit": self.test_limit,
            "precision": self.machine.precision,
            **more,
            "data": _location(self.data),
        }

    @contextmanager
    def working_in(
        self, folder: Path, jobs: Sequence[Job], common: dict[str, Any], go_on: GoOn
    ) -> Generator[None]:
        """Own a folder of runs, new or with the same settings, until the end of the block.

        Every job's folder, and the schedules of the jobs that are left, are checked first. A signal
        ends the command with the words of ``go_on``.

        Raises:
            ValueError: a schedule is refused, the folder has runs with other settings, a job's
                folder has another run or files that are not of a run, or another process writes
                to one of them.
        """
        try:
            with ExitStack() as held:
                if here := folder.exists():
                    held.enter_context(writing_to(folder))
                common = self._check(folder, jobs, common)
                if not here:
                    held.enter_context(writing_to(folder))
                open_folder(folder, common)
                self._say_what_is_there(jobs)
                yield
        except Interrupted as stop:
            go_on.leave(stop)

    def _check(self, folder: Path, jobs: Sequence[Job], common: dict[str, Any]) -> dict[str, Any]:
        """Check the settings and every job's folder; read data only if there is a need to."""
        there = _read_or_move(folder)
        if self.command == "train":
            _refuse_other_runs(folder, jobs)
        check_folder(folder, common)
        self._settings = {key: common[key] for key in ("epochs", "precision")}
        left = self._left(folder, jobs)
        if left or "data_digest" not in there or there.get("data") != common["data"]:
            digest = self.check(left or jobs[:1])
        else:
            digest = there["data_digest"]
        common = {**common, "data_digest": digest}
        check_folder(folder, common)
        self._settings["data_digest"] = digest
        self._left(folder, jobs)
        return common

    def _say_what_is_there(self, jobs: Sequence[Job]) -> None:
        if len(self.finished_before) == len(jobs):
            self.terminal.print("Finished already: the results again.")
        elif self.finished_before:
            kept = plural(len(self.finished_before), "run")
            self.terminal.print(f"{kept} of {len(jobs)} finished before.")
        if find_spec("matplotlib") is None:
            _say(f"there will be no figures, they need matplotlib: {install_command('report')}")

    def _left(self, folder: Path, jobs: Sequence[Job]) -> list[Job]:
        """The jobs that are not finished, none of which another process may be at work on."""
        found = [(job, find(job, self._settings, folder).state) for job in jobs]
        self.finished_before = [job for job, state in found if state == "finished"]
        self.resumed = [job for job, state in found if state == "unfinished"]
        left = [job for job, state in found if state != "finished"]
        for job in left:
            if job.folder != folder and job.folder.exists():
                with writing_to(job.folder):
                    pass
        return left

    def check(self, jobs: Sequence[Job]) -> str:
        """Check the schedules of jobs on the data, and return the digest of the data.

        Raises:
            ValueError: a schedule is refused.
        """
        task = self._task(jobs[0])
        chosen = {(id(j.recipe), j.schedule): (j.recipe, j.schedule) for j in jobs}
        new = [value for key, value in chosen.items() if key not in self._checked]
        lead = leader()
        with independent():
            check_schedules(
                new,
                task,
                self.epochs,
                measure=self.machine.measure,
                autocast=self.machine.autocast,
                processes=Processes() if lead is None else lead.processes,
            )
        self._checked |= chosen.keys()
        return data_digest(task)

    def goes_on(self, folder: Path, jobs: Sequence[Job], common: dict[str, Any]) -> bool:
        """Whether a folder has runs with these settings that are not finished, and is free.

        Raises:
            ValueError: it cannot be read, or has other runs.
        """
        if not (there := read_common(folder)) or there.get("data_digest") != common["data_digest"]:
            return False
        check_folder(folder, common)
        with owned(folder):
            return bool(self._left(folder, jobs))

    def status(self, folder: Path) -> dict[str, Any]:
        """What is printed as JSON about the folder and its runs."""
        return {
            "folder": str(folder),
            "status": "finished",
            "finished_before": [str(job.folder) for job in self.finished_before],
            "resumed": [str(job.folder) for job in self.resumed],
        }

    def runs(self, jobs: Sequence[Job], folder: Path) -> Iterator[tuple[Job, Run]]:
        """Yield each job with its finished run, which is trained unless it was finished before."""
        train = partial(self._train, folder=folder)
        return run_jobs(jobs, train, self._settings, _say, held=folder)

    def _train(self, job: Job, *, folder: Path) -> None:
        """Train one job, or go on with it; if it diverges, say so and leave it unfinished."""
        task = self._task(job)
        one = self.command == "train"  # of several runs, the report has the changes
        name = job.schedule if one else job.folder.relative_to(folder).as_posix()
        sinks = open_sinks(self.backends, job.folder)
        stop = StopSignals()
        try:
            with (
                ProgressListener(
                    self.terminal, name, self.epochs, task.metric, changes=one
                ) as listener,
                stop,
                self._together(job, task) as processes,
            ):
                run_schedule(
                    job.recipe,
                    job.schedule,
                    task,
                    job.folder,
                    listener,
                    seed=job.seed,
                    epochs=self.epochs,
                    machine=self.machine,
                    sinks=sinks,
                    checkpoints=self.checkpoints,
                    stop=stop.requested,
                    say=_say,
                    processes=processes,
                )
        except DivergedError as error:
            self.diverged[job.folder] = error
            self.terminal.print(f"{name} diverged: {error}", markup=False)
        stop.check()  # a signal after the last step

    def _together(self, job: Job, task: Task) -> AbstractContextManager[Processes]:
        """The processes that train a job: this one, or all that were started."""
        if (lead := leader()) is None:
            return nullcontext(Processes())
        limits = self.train_limit, self.test_limit
        return lead.training(Order(job, self.machine, self.epochs, self.data, *limits), task)

    def _task(self, job: Job) -> Task:
        """The task of a seed, cached while consecutive jobs have that seed."""
        if job.seed not in self._tasks:
            self._tasks = {
                job.seed: make_task(
                    job.recipe,
                    self.data,
                    seed=job.seed,
                    device=self.machine.device,
                    train_limit=self.train_limit,
                    test_limit=self.test_limit,
                )
            }
        return self._tasks[job.seed]

    def write_page(self, folder: Path) -> str | None:
        """Write the report of all runs in the folder; None if it cannot be written."""
        with self.showing("report.html"):
            return str(write_report(folder))
        return None

    @contextmanager
    def showing(self, what: str) -> Generator[None]:
        """A block without which the results can be printed all the same.

        Why there is none is said, such as a folder that is read-only; an error of the disk is
        raised by :meth:`finish`.
        """
        try:
            yield
        except (ImportError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                self._disk_error = error
            else:
                _say(f"no {what}: {error}")

    def finish(self) -> None:
        """Raise an error if any run diverged, or if a report or a figure could not be written.

        Raises:
            DivergedError: with the folders of the runs.
            OSError: why it could not be written.
        """
        if self.diverged:
            told = ", ".join(f"{folder} ({error})" for folder, error in self.diverged.items())
            raise DivergedError(f"diverged and left unfinished: {told}")
        if self._disk_error is not None:
            raise self._disk_error


@contextmanager
def writing_to(folder: Path) -> Generator[None]:
    """Own a folder of runs within the block.

    Raises:
        RecipeError: it cannot be made or written to.
        FolderInUseError: another process writes to it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(owned(folder))
        except OSError as error:
            raise not_writable(folder, error) from error
        yield


def not_writable(folder: Path, error: OSError) -> Exception:
    """Why no run can be written to a folder; an error of the disk stays what it is."""
    if error.errno in FULL_DISK:
        return error
    reason = error.strerror or error
    return RecipeError(
        f"no run can be written to {folder} ({reason}); pass another folder with --out"
    )


def _say(text: str) -> None:
    with suppress(OSError):  # closed
        print(f"dynarank: {text}", file=sys.stderr)


def _refuse_other_runs(folder: Path, jobs: Sequence[Job]) -> None:
    with suppress(FileNotFoundError):
        if others := set(find_runs(folder)) - {job.folder for job in jobs}:
            raise RecipeError(f"{folder} already holds a run: {min(others)}; pass another --out")


def _location(data: str | None) -> str | None:
    """Where --data is, whatever folder the next command is called from."""
    return str(Path(data).resolve()) if data and Path(data).exists() else data


def _read_or_move(folder: Path) -> dict[str, Any]:
    """The stored settings of a folder; if they are ours and damaged, they are moved aside."""
    try:
        return read_common(folder) or {}
    except DamagedFileError as error:
        if not is_ours(folder / COMMON, b'"command"'):
            way_out = "move it away, or pass another --out"
            raise DamagedFileError(error.name, error.problem, way_out) from error
        _say(f"{error}; moved to {move_aside(folder / COMMON)}; each run is checked by its own")
        return {}
