"""A folder of runs, each trained once: a comparison or a sweep that can be interrupted.

A run is finished when its records end with a summary; it is then read instead of repeated. An
interrupted run starts over. The settings that all runs share are stored next to them, and a folder
of runs with different settings is rejected.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynarank.records import Run, read_run
from dynarank.train.recipes import Recipe, RecipeError

__all__ = ["Job", "finished", "open_folder", "run_jobs"]

_COMMON = "common.json"


@dataclass(frozen=True)
class Job:
    """One run of many.

    Args:
        folder: the folder of the run, inside the common folder.
        recipe: the recipe to train.
        schedule: the name of the schedule.
        seed: the seed of weights, data order and augmentation.
    """

    folder: Path
    recipe: Recipe
    schedule: str
    seed: int


def open_folder(folder: Path, common: dict[str, Any]) -> None:
    """Start a folder of runs, or resume one that was started with the same settings.

    Args:
        folder: created if missing.
        common: the settings that all its runs share; must be serializable as JSON.

    Raises:
        RecipeError: the folder contains runs with different settings.
    """
    place = folder / _COMMON
    if place.exists():
        there = json.loads(place.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(common))
        differs = [k for k in {**there, **wanted} if there.get(k) != wanted.get(k)]
        if differs:
            told = "; ".join(f"{k}: {there.get(k)} there, {wanted.get(k)} now" for k in differs)
            raise RecipeError(
                f"{folder} contains runs with other settings ({told}); pass another folder with "
                "--out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(common, indent=2) + "\n", encoding="utf-8")


def finished(folder: Path) -> Run | None:
    """The run in a folder if it is finished, else None."""
    if not (folder / "records.jsonl").exists():
        return None
    try:
        run = read_run(folder)
    except ValueError:  # interrupted before the first record was complete
        return None
    return run if run.summary is not None else None


def run_jobs(jobs: Sequence[Job], run: Callable[[Job], object]) -> Iterator[tuple[Job, Run]]:
    """Yield each job with its finished run, which is trained unless it was finished before.

    Args:
        jobs: the jobs, in order.
        run: a function that trains one job; an interrupted run's files are removed first.
    """
    for job in jobs:
        if (done := finished(job.folder)) is None:
            shutil.rmtree(job.folder, ignore_errors=True)
            run(job)
            done = finished(job.folder)
        if done is not None:
            yield job, done
