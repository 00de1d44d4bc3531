"""Default layers: what they save in well-known models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .methods_shared import row
from .records import read_json

PAGE = "docs/methods/default-layers.md"
SETTINGS = ("saves less than 5% of the entries",)


def claims() -> Iterator[str]:
    """Yield the rows of the table."""
    for model in read_json("selection/results/2026-11-28/defaults.json")["rows"]:
        chosen = f"{model['chosen']} of {model['weights']}"
        shares = [f"{model[key]:.3f}x" for key in ("flops_of_chosen", "flops", "parameters")]
        left = Counter(reason.split(":")[0] for reason in model["left"].values())
        reasons = ", ".join(f"{count} {why}" for why, count in left.items())
        yield row(model["model"], chosen, *shares, reasons)
