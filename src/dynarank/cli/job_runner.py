"""The job runner of ``compare`` and ``sweep``: it trains jobs one after another on one machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dynarank.cli.show import ProgressListener
from dynarank.report import write_report
from dynarank.train.grid import Job, finished, open_folder
from dynarank.train.loop import DivergedError, Machine
from dynarank.train.recipes import Recipe
from dynarank.train.run import run_schedule
from dynarank.train.schedules import check_schedules
from dynarank.train.task import Task
from dynarank.train.tasks import make_task

__all__ = ["JobRunner", "write_page"]


@dataclass
class JobRunner:
    """Runs jobs one after another on one machine.

    Args:
        terminal: where progress is shown.
        machine: device and precision.
        data: where the data set is.
        epochs: the length of each run.
        train_limit: number of training examples; None: all.
        test_limit: number of test examples; None: all.
    """

    terminal: Console
    machine: Machine
    data: str | None
    epochs: int
    train_limit: int | None
    test_limit: int | None
    diverged: list[Job] = field(default_factory=list[Job])
    _tasks: dict[int, Task] = field(default_factory=dict[int, Task])

    def open_folder(self, folder: Path, recipe: Recipe, jobs: Sequence[Job], **more: Any) -> None:
        """Start or resume a folder of runs, see :func:`dynarank.train.grid.open_folder`.

        The schedules of the jobs that are left are checked first.

        Raises:
            ValueError: a schedule is refused, or the folder has runs with other settings.
        """
        if left := [job for job in jobs if finished(job.folder) is None]:
            chosen = {(id(j.recipe), j.schedule): (j.recipe, j.schedule) for j in left}
            check_schedules(chosen.values(), self._task(left[0]), self.epochs)
        common = {
            "recipe": recipe.model_dump(mode="json"),
            "epochs": self.epochs,
            "train_limit": self.train_limit,
            "test_limit": self.test_limit,
            "precision": self.machine.precision,
            **more,
        }
        open_folder(folder, common)

    def run(self, job: Job) -> None:
        """Train one job; if it diverges, say so and leave it unfinished."""
        task = self._task(job)
        name = f"{job.schedule}, seed {job.seed}"
        self.terminal.print(f"{job.folder}:")
        try:
            with ProgressListener(self.terminal, name, self.epochs, task.metric) as listener:
                run_schedule(
                    job.recipe,
                    job.schedule,
                    task,
                    job.folder,
                    listener,
                    seed=job.seed,
                    epochs=self.epochs,
                    machine=self.machine,
                )
        except DivergedError as error:
            self.diverged.append(job)
            self.terminal.print(f"{name} diverged: {error}")

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

    def finish(self) -> None:
        """Raise an error if any run diverged.

        Raises:
            DivergedError: with the folders of the runs.
        """
        if self.diverged:
            told = ", ".join(str(job.folder) for job in self.diverged)
            raise DivergedError(f"diverged and left unfinished: {told}")


def write_page(folder: Path, terminal: Console) -> str | None:
    """Write the report of all runs in the folder; None, with the reason, without matplotlib."""
    try:
        return str(write_report(folder))
    except ImportError as error:
        terminal.print(f"No report.html: {error}")
        return None
