"""The configuration of a run, by which the same run is recognized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from dynarank.files.atomic import write_text
from dynarank.files.json_data import parse_json
from dynarank.files.reading import DamagedFileError, read_bytes
from dynarank.files.sealed_json import sealed, unsealed
from dynarank.train.data_digest import data_digest
from dynarank.train.grid import differences
from dynarank.train.loop import Machine
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.task import Task

__all__ = ["check_config", "run_config", "write_config"]

_CONFIG = "config.json"
_FORMAT = 1
_MAX_BYTES = 64 << 20


def run_config(
    recipe: Recipe, schedule: str, task: Task, *, seed: int, epochs: int, machine: Machine
) -> dict[str, Any]:
    """The settings of a run, as plain data."""
    return {
        "format": _FORMAT,
        "recipe": recipe.model_dump(mode="json"),
        "schedule": schedule,
        "seed": seed,
        "epochs": epochs,
        "precision": machine.precision,
        "measure": machine.measure,
        "noise": machine.noise,
        "train_size": task.train_size,
        "data_digest": data_digest(task),
        "data": dict(getattr(task, "facts", {})),  # for data that the recipe does not determine
    }


def check_config(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder holds this very run; False if it holds none.

    Raises:
        RecipeError: it holds another run: which settings differ.
        DamagedFileError: its configuration cannot be read.
    """
    path = folder / _CONFIG
    if not path.exists():
        if (folder / "records.jsonl").exists():
            raise RecipeError(f"{folder} holds a run without {_CONFIG}; pass another folder")
        return False
    _refuse_others(folder, _read(path), config)
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        there = parse_json(unsealed(read_bytes(path, _MAX_BYTES)), path.name, allow_nan=True)
    except DamagedFileError:
        raise
    except ValueError as error:
        raise DamagedFileError(path, str(error), "pass another folder") from None
    if not isinstance(there, dict):
        raise DamagedFileError(path, "it does not hold settings", "pass another folder")
    return cast("dict[str, Any]", there)


def _refuse_others(folder: Path, there: dict[str, Any], config: dict[str, Any]) -> None:
    asked = {key: value for key, value in config.items() if key not in ("data", "format")}
    if told := "; ".join(differences(there, asked)):
        raise RecipeError(
            f"{folder} holds a run with other settings ({told}); ask for the same, or pass another "
            "folder"
        )


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a new run; its folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _CONFIG, sealed(json.dumps(config, indent=2)) + "\n")
