"""The folder of a recording: whose it is, and what of it stays when a run goes on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dynarank.files.atomic import write_text
from dynarank.files.json_data import parse_json
from dynarank.files.ownership import move_aside
from dynarank.files.reading import DamagedFileError, read_bytes
from dynarank.files.sealed_json import sealed, unsealed
from dynarank.records import PhaseRecord, Record, Run, SummaryRecord, read_run

__all__ = ["check_folder", "kept_records", "write_settings"]

_RECORDS, _CONFIG = "records.jsonl", "config.json"
_MAX_BYTES = 64 << 20
_ELSE = "pass another folder"


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder holds another run than that of these settings."""
    if not (folder / _RECORDS).exists() and not (folder / _CONFIG).exists():
        return
    if not (folder / _CONFIG).exists():
        raise ValueError(f"{folder} holds a run without {_CONFIG}; {_ELSE}")
    there = _read(folder / _CONFIG)
    if "recorder" not in there:
        raise ValueError(f"{folder} holds a run of `dynarank train`; {_ELSE}")
    own, wanted = there["recorder"], json.loads(json.dumps(settings))
    if not isinstance(own, dict):
        raise DamagedFileError(folder / _CONFIG, "it does not hold settings", _ELSE)
    held = cast("dict[str, Any]", own)
    if other := [key for key in wanted if held.get(key) != wanted[key]]:
        told = "; ".join(
            f"{key}: {_short(held.get(key))}, not {_short(wanted[key])}" for key in other
        )
        raise ValueError(f"{folder} holds another run ({told}); {_ELSE}")


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings by which the run is recognized."""
    data = {"format": 1, "recipe": {"name": settings["name"]}, "recorder": dict(settings)}
    write_text(folder / _CONFIG, sealed(json.dumps(data, indent=2)) + "\n")


def kept_records(folder: Path, step: int) -> list[Record]:
    """The records of an unfinished run that goes on after this step; none of a run that begins.

    Raises:
        ValueError: the run is finished, or its records end before the step.
    """
    if not (folder / _RECORDS).exists():
        return []
    run = read_run(folder)
    last = max((_written_at(record) for record in run.records), default=0)
    if run.summary is not None and step != last:
        raise ValueError(
            f"{folder} holds a finished run of {last:,} steps, and this one is at step {step:,}; "
            + _ELSE
        )
    if step == 0:
        aside = move_aside(folder / _RECORDS)
        warnings.warn(
            f"{folder} holds an unfinished run, and this one begins at step 0: its records are now "
            f"in {aside.name}. To go on with it, load its checkpoint before training (dr.load); "
            "without a rank scheduler, also give Recorder(..., start=the steps done)",
            UserWarning,
            stacklevel=6,
        )
        return []
    _warn_of_damage(run)
    stay = (r for r in run.records if _written_at(r) <= step)
    return list[Record](r for r in stay if not isinstance(r, SummaryRecord))


def _written_at(record: Record) -> int:
    """The step after which a record was written; that of a phase after its first step."""
    step = getattr(record, "step", 0)
    return step + 1 if isinstance(record, PhaseRecord) else step


def _warn_of_damage(run: Run) -> None:
    for told in run.damage:
        warnings.warn(f"{run.folder}: {told}", UserWarning, stacklevel=7)


def _read(path: Path) -> dict[str, Any]:
    try:
        there = parse_json(unsealed(read_bytes(path, _MAX_BYTES)), path.name, allow_nan=True)
    except DamagedFileError:
        raise
    except ValueError as error:
        raise DamagedFileError(path, str(error), _ELSE) from None
    if not isinstance(there, dict):
        raise DamagedFileError(path, "it does not hold settings", _ELSE)
    return cast("dict[str, Any]", there)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
