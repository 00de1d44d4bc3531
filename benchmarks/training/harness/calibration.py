"""What changes cost: mostly the FLOPs of the passes over a few batches that come with each cut.

They are not among the training FLOPs of the records; ``replay`` counts them, one run of each arm.
"""

from __future__ import annotations

import json
from functools import cache

from benchmarks.training.harness.store import ROOT

FILE = ROOT / "calibration.json"


@cache
def shares() -> dict[str, dict[str, float]]:
    """What calibration costs, by experiment and arm, relative to full rank's training."""
    return json.loads(FILE.read_text(encoding="utf-8"))["shares"] if FILE.exists() else {}
