"""What an arm costs besides its training steps: FLOPs that the records do not have.

Mostly those of the passes over a few batches that come with each cut; for arms that decay products
or have a penalty, those of these too. ``replay`` counts them, one run of each arm, into
``calibration.json`` beside the records.
"""

from __future__ import annotations

import fcntl
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.training.harness.identity import commit, digest
from benchmarks.training.harness.record import Run
from benchmarks.training.harness.store import ROOT
from dynarank.files.atomic import write_text
from dynarank.recording.host import versions

NAME = "calibration.json"


def share(experiment: str, run: Run, folder: Path = ROOT) -> float | None:
    """What is besides, of the arm of a run, relative to full rank's training; None: not counted."""
    found = _shares(folder).get(experiment, {}).get(key(run))
    return found["share"] if found is not None and found["of"] == cause(run) else None


def key(run: Run) -> str:
    """The arm of a run, and whether products are decayed: that is tuned, and costs FLOPs."""
    return run["arm"] + (", products decayed" if run["setting"]["decay"] == "product" else "")


def cause(run: Run) -> str:
    """A short name of what the count follows from: another schedule or problem has another."""
    options = (run.get("batches"), run.get("by_data", True), run.get("penalty"))
    network = round(run["training_flops"] / run["flops"])
    about = [run["schedule"], run["steps"], network, *options]
    if "problem" in run:  # older records do not say it
        about += [run["problem"]["calibrated_on"], run["problem"]["layers"]]
    return digest(json.dumps(about, sort_keys=True).encode())


@cache
def _shares(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    return _read(folder).get("shares", {})


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add(experiment: str, run: Run, value: float, folder: Path = ROOT) -> None:
    """Write what was counted; several processes may, at once."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        found = {**_read(folder), "commit": commit(), "versions": versions()}
        arms = found.setdefault("shares", {}).setdefault(experiment, {})
        arms[key(run)] = {"share": value, "of": cause(run)}
        write_text(folder / NAME, json.dumps(found, indent=1, sort_keys=True) + "\n")
    finally:
        os.close(directory)
    _shares.cache_clear()
