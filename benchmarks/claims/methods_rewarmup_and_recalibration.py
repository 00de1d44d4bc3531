"""LR re-warm-up and BatchNorm recalibration: losses after a change."""

from __future__ import annotations

from collections.abc import Iterator

from .methods_shared import number, row, spread
from .records import read_json, select

PAGE = "docs/methods/rewarmup-and-recalibration.md"
SETTINGS: tuple[str, ...] = ()
ARMS = {
    "adapted": "adapted",
    "adapted, rewarm 20": "adapted, re-warm-up 20",
    "low-rank": "low-rank",
    "low-rank, rewarm 20": "low-rank, re-warm-up 20",
    "low-rank, renew": "low-rank, recalibration",
    "low-rank, renew, rewarm 20": "low-rank, recalibration, re-warm-up 20",
}


def claims() -> Iterator[str]:
    """Yield the rows of the table."""
    runs = read_json("training/results/2026-11-24-after-a-change/digits.json")["runs"]
    yield f"{number(*(select(runs, arm=arm) for arm in ARMS))}:"
    for arm, name in ARMS.items():
        group = select(runs, arm=arm)
        times = ("before", "0", "20", "50", "end")
        yield row(name, *(spread([run[time]["loss"] for run in group], 3) for time in times))
