"""What commands of many runs share: their machine and data, one run, and what it looks like."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dynarank.cli.show import ProgressListener
from dynarank.report import write_report
from dynarank.train.grid import Job, claim
from dynarank.train.loop import DivergedError, Machine
from dynarank.train.recipes import Recipe
from dynarank.train.run import run_schedule
from dynarank.train.task import Task
from dynarank.train.tasks import make_task

__all__ = ["Many", "write_page"]


@dataclass
class Many:
    """Runs many jobs, one after another, on one machine.

    Args:
        terminal: where to show them.
        machine: where to compute.
        data: where the data is.
        epochs: the length of each.
        train_limit: examples to train on; None: all.
        test_limit: examples to test on; None: all.
    """

    terminal: Console
    machine: Machine
    data: str | None
    epochs: int
    train_limit: int | None
    test_limit: int | None
    diverged: list[Job] = field(default_factory=list[Job])
    _tasks: dict[int, Task] = field(default_factory=dict[int, Task])

    def claim(self, folder: Path, recipe: Recipe, **more: Any) -> None:
        """Begin or go on in a folder of runs of this recipe, see ``dynarank.train.grid.claim``."""
        common = {
            "recipe": recipe.model_dump(mode="json"),
            "epochs": self.epochs,
            "train_limit": self.train_limit,
            "test_limit": self.test_limit,
            "precision": self.machine.precision,
            **more,
        }
        claim(folder, common)

    def run(self, job: Job) -> None:
        """Make one run; one that diverges is told and left unfinished."""
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
        """The data for a seed, kept while its runs follow one another."""
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
        """End with an error if a run diverged.

        Raises:
            DivergedError: naming the runs.
        """
        if self.diverged:
            told = ", ".join(str(job.folder) for job in self.diverged)
            raise DivergedError(f"diverged and left unfinished: {told}")


def write_page(folder: Path, terminal: Console) -> str | None:
    """The report of all runs there; None, and why, where it cannot be drawn."""
    try:
        return str(write_report(folder))
    except ImportError as error:
        terminal.print(f"No report.html: {error}")
        return None
