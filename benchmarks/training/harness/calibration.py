"""What an arm costs besides its training steps: FLOPs that the records do not have.

Mostly those of the passes over a few batches that come with each cut; for arms that decay products
or have a penalty, those of these too. ``replay`` counts them, one run of each arm.
"""

from __future__ import annotations

import json
from functools import cache

from benchmarks.training.harness.record import Run
from benchmarks.training.harness.store import ROOT

FILE = ROOT / "calibration.json"


@cache
def shares() -> dict[str, dict[str, float]]:
    """What is besides, by experiment and :func:`key`, relative to full rank's training."""
    return json.loads(FILE.read_text(encoding="utf-8"))["shares"] if FILE.exists() else {}


def key(run: Run) -> str:
    """The arm of a run, and whether products are decayed: that is tuned, and costs FLOPs."""
    return run["arm"] + (", products decayed" if run["setting"]["decay"] == "product" else "")
