"""Many runs in one folder, each made once: a comparison or a sweep that can be interrupted.

A run is finished when its records end with a summary; it is then read, not repeated. One that was
cut off begins again. What all runs have in common is written beside them, and a folder whose runs
were made otherwise is not gone on with.
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

__all__ = ["Job", "claim", "finished", "run_jobs"]

_COMMON = "common.json"


@dataclass(frozen=True)
class Job:
    """One run of many.

    Args:
        folder: where, below the common one.
        recipe: what.
        schedule: the schedule's name.
        seed: of everything.
    """

    folder: Path
    recipe: Recipe
    schedule: str
    seed: int


def claim(folder: Path, common: dict[str, Any]) -> None:
    """Begin a folder of runs, or go on with one that was begun alike.

    Args:
        folder: made if it is not there.
        common: what all runs in it share, as JSON has it.

    Raises:
        RecipeError: runs with other settings are there.
    """
    place = folder / _COMMON
    if place.exists():
        there = json.loads(place.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(common))
        differs = [k for k in {**there, **wanted} if there.get(k) != wanted.get(k)]
        if differs:
            told = "; ".join(f"{k} {there.get(k)} there, {wanted.get(k)} asked" for k in differs)
            raise RecipeError(
                f"{folder} holds runs made otherwise ({told}); name another folder with --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(common, indent=2) + "\n", encoding="utf-8")


def finished(folder: Path) -> Run | None:
    """The run of a folder if it came to its end, else None."""
    if not (folder / "records.jsonl").exists():
        return None
    try:
        run = read_run(folder)
    except ValueError:  # cut off before its first record was whole
        return None
    return run if run.summary is not None else None


def run_jobs(jobs: Sequence[Job], run: Callable[[Job], object]) -> Iterator[tuple[Job, Run]]:
    """Each job with its finished run, made now unless it was made before.

    Args:
        jobs: in the order in which to make them.
        run: makes one; the remains of one that was cut off are removed first.
    """
    for job in jobs:
        if (done := finished(job.folder)) is None:
            shutil.rmtree(job.folder, ignore_errors=True)
            run(job)
            done = finished(job.folder)
        if done is not None:
            yield job, done
