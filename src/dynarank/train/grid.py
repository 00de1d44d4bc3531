"""A folder of runs, each trained once, that survives whatever stops them.

A run is finished when its records end with a summary and its weights are there; it is then read
instead of repeated. An unfinished one goes on from its last checkpoint. Runs of another experiment
and files of other owners are refused by name, a run that cannot be read is moved aside, and nothing
is ever deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from pydantic_core import to_jsonable_python

from dynarank.files.atomic import write_text
from dynarank.files.json_data import parse_json
from dynarank.files.ownership import move_aside, owned
from dynarank.files.reading import DamagedFileError, read_bytes, sha256
from dynarank.files.sealed_json import sealed, unsealed
from dynarank.records import Run, read_run
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError

__all__ = [
    "COMMON",
    "Found",
    "Job",
    "differences",
    "find",
    "is_ours",
    "open_folder",
    "read_common",
    "run_jobs",
]

COMMON = "common.json"
_NO_SETTINGS = ("summary", "folder", "num_workers")  # of a recipe
_DEFAULTS: dict[str, Any] = {
    name: to_jsonable_python(field.get_default(call_default_factory=True))
    for name, field in Recipe.model_fields.items()
    if not field.is_required()
}
_FILES = ("config.json", "records.jsonl", "model.safetensors", "factors.safetensors")
_NOTES = ("data", "log")  # where data was and what was logged: they make no other experiment
_MARKS = {"config.json": (b'"recipe"', b'"schedule"'), "records.jsonl": (b'"kind"', b'"run"')}
_MARK_BYTES = 1 << 20  # a marker is looked for in so much of a file
_SETTINGS_BYTES = 1 << 26


@dataclass(frozen=True)
class Job:
    """One run of many.

    Args:
        folder: the folder of the run: inside the common folder, or that folder itself.
        recipe: the recipe to train.
        schedule: the name of the schedule.
        seed: the seed of weights, data order and augmentation.
    """

    folder: Path
    recipe: Recipe
    schedule: str
    seed: int


@dataclass(frozen=True)
class Found:
    """What the folder of a job holds.

    Args:
        state: ``new``: no run; ``unfinished``: one that goes on; ``finished``; ``unreadable``.
        run: the finished run.
        why: why it cannot be read.
    """

    state: Literal["new", "unfinished", "finished", "unreadable"]
    run: Run | None = None
    why: str = ""


def read_common(folder: Path) -> dict[str, Any] | None:
    """The settings that the runs of a folder share; None if none are stored.

    Raises:
        DamagedFileError: they cannot be read.
    """
    place = folder / COMMON
    return _mapping(place) if place.exists() else None


def open_folder(folder: Path, common: Mapping[str, Any]) -> None:
    """Start a folder of runs, or go on with one that was started with the same settings.

    Args:
        folder: created if missing.
        common: the settings that all its runs share; must be serializable as JSON.

    Raises:
        RecipeError: the folder contains runs with different settings.
        DamagedFileError: its settings cannot be read.
    """
    check_folder(folder, common)
    folder.mkdir(parents=True, exist_ok=True)
    common = {**(read_common(folder) or {}), **common}  # what a newer version wrote stays
    write_text(folder / COMMON, sealed(json.dumps(common, indent=2)) + "\n")


def check_folder(folder: Path, common: Mapping[str, Any]) -> None:
    """Refuse a folder that was started with other settings.

    Raises:
        RecipeError: it contains runs with different settings.
        DamagedFileError: its settings cannot be read.
    """
    there = read_common(folder)
    asked = {key: value for key, value in common.items() if key not in _NOTES}
    if there is not None and (told := "; ".join(differences(there, asked))):
        raise RecipeError(
            f"{folder} contains runs with other settings ({told}); pass another folder with --out"
        )


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Each setting that is asked for and was another, with both values.

    Args:
        there: the stored settings; those of newer versions that nobody asks for are passed over.
        asked: the settings asked for; a recipe is compared field by field.

    Example:
        >>> differences({"epochs": 3, "seed": 0}, {"epochs": 4, "seed": 0})
        ['epochs: 3 there, 4 now']
    """
    found: list[str] = []
    for key, value in cast("dict[str, Any]", json.loads(json.dumps(asked))).items():
        old = there.get(key)
        if key == "recipe" and isinstance(value, dict) and isinstance(old, dict):
            found += _recipe_differences(cast("dict[str, Any]", old), cast("dict[str, Any]", value))
        elif old != value:
            digits = 12 if key == "data_digest" else None  # enough to show that they differ
            found.append(f"{key}: {str(old)[:digits]} there, {str(value)[:digits]} now")
    return found


def _recipe_differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """The differences of two recipes; of two names, no other.

    A key that an older version did not know has its default.
    """
    there, asked = {**_DEFAULTS, **there}, {**_DEFAULTS, **asked}
    names = ["name"] if there.get("name") != asked["name"] else [*there, *asked]
    return [
        f"recipe.{name}: {there.get(name)} there, {asked.get(name)} now"
        for name in dict.fromkeys(names)
        if name not in _NO_SETTINGS and there.get(name) != asked.get(name)
    ]


def find(job: Job, settings: Mapping[str, Any], common: Path | None = None) -> Found:
    """What the folder of a job holds; nothing is changed.

    Args:
        job: the job.
        settings: what else the configuration of its run must say, such as the number of epochs.
        common: the folder of all runs; if it is that of the job, other files may lie in it.

    Raises:
        RecipeError: another run, or files that are not of a run.
    """
    names = _names(job.folder)
    if job.folder == common:
        names = [name for name in names if name in _FILES]
    if not names:
        return Found("new")
    if not _ours(job.folder):
        listed = ", ".join(names[:3])
        raise RecipeError(
            f"{job.folder} holds files that are not of a run ({listed}); move them away, or pass "
            "another folder with --out"
        )
    try:
        return _read(job, settings)
    except RecipeError:
        raise
    except (ValueError, FileNotFoundError) as error:  # another OSError says nothing of the file
        return Found("unreadable", why=str(error))


def run_jobs(
    jobs: Sequence[Job],
    run: Callable[[Job], object],
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    *,
    held: Path | None = None,
) -> Iterator[tuple[Job, Run]]:
    """Yield each job with its finished run, which is trained unless it was finished before.

    Args:
        jobs: the jobs, in order.
        run: a function that trains one job, or goes on with it.
        settings: see :func:`find`.
        say: called with what the user must know.
        held: the folder of all runs, which the caller owns.

    Raises:
        RecipeError: the folder of a job holds another run, or files that are not of a run.
        FolderInUseError: another process writes to it.
    """
    for job in jobs:
        found = find(job, settings, held)
        if found.state == "unreadable":
            if job.folder == held:
                raise RecipeError(f"{found.why}; move {held} away, or pass another --out")
            with owned(job.folder):  # refused while another process writes to it
                pass
            _move_aside(job, found.why, say)
        if found.state != "finished":
            try:
                _run(job, run, held)
            except DamagedFileError as error:  # of its checkpoints or records
                if job.folder == held or not _lies_in(error.name, job.folder):
                    raise
                _move_aside(job, str(error), say)
                _run(job, run, held)
            found = find(job, settings, held)
        if found.run is not None:
            yield job, found.run


def _run(job: Job, run: Callable[[Job], object], held: Path | None) -> None:
    with nullcontext() if job.folder == held else owned(job.folder):
        run(job)


def _move_aside(job: Job, why: str, say: Callable[[str], None]) -> None:
    say(f"{job.folder} cannot be read and was moved to {move_aside(job.folder)}: {why}")


def _lies_in(name: str, folder: Path) -> bool:
    return Path(name).resolve().is_relative_to(folder.resolve())


def _read(job: Job, settings: Mapping[str, Any]) -> Found:
    """The state of a run of ours.

    Raises:
        RecipeError: it is another run than the job's.
        ValueError: a file is damaged.
        FileNotFoundError: a file is missing.
    """
    asked = {"recipe": job.recipe.model_dump(mode="json"), "schedule": job.schedule,
             "seed": job.seed, **settings}  # fmt: skip
    _refuse_another(job.folder, "config.json", _mapping(job.folder / "config.json"), asked)
    if not (job.folder / "records.jsonl").exists():
        return Found("unfinished")
    run = read_run(job.folder)
    if run.damage:
        raise DamagedFileError(job.folder, "; ".join(run.damage))
    header = run.header.model_dump(mode="json")
    told = {**asked, "recipe": job.recipe.name}
    _refuse_another(job.folder, "records.jsonl", header, {k: told[k] for k in told if k in header})
    if run.summary is None:
        return Found("unfinished")
    weights = job.folder / "model.safetensors"
    if run.summary.model_sha256 != _sha256(weights):
        raise DamagedFileError(weights, "it has changed since it was written (SHA-256 differs)")
    return Found("finished", run)


def _sha256(path: Path) -> str:
    state = path.stat()
    return _sha256_of(path, state.st_size, state.st_mtime_ns, state.st_ino)


@cache
def _sha256_of(path: Path, *state: int) -> str:
    """The SHA-256 of a file, computed once for each state of it."""
    return sha256(path)


def _refuse_another(
    folder: Path, name: str, there: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    if told := "; ".join(differences(there, asked)):
        raise RecipeError(
            f"{folder} holds another run than the one asked for ({told}, says {name}); move it "
            "away, or pass another folder with --out"
        )


def _mapping(place: Path) -> dict[str, Any]:
    """The settings in a file.

    Raises:
        DamagedFileError: it has changed since it was written, or holds none.
    """
    try:
        data = unsealed(read_bytes(place, _SETTINGS_BYTES))
    except DamagedFileError:
        raise
    except ValueError as error:
        raise DamagedFileError(place, str(error)) from error
    found = parse_json(data, str(place))
    if not isinstance(found, dict):
        raise DamagedFileError(place, "it does not hold settings")
    return cast("dict[str, Any]", found)


def _names(folder: Path) -> list[str]:
    """The names in a folder but for the common settings and hidden files, such as a lock."""
    if not folder.exists():
        return []
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name != COMMON and not name.startswith(".")]


def _ours(folder: Path) -> bool:
    """Whether a run of ours is in a folder, even a damaged one: one of its files still says so."""
    return any(is_ours(folder / name, *marks) for name, marks in _MARKS.items())


def is_ours(place: Path, *marks: bytes) -> bool:
    """Whether a file, even a damaged one, begins with what only ours hold."""
    if not place.is_file():
        return False
    with place.open("rb") as file:
        head = file.read(_MARK_BYTES)
    return all(mark in head for mark in marks)
