"""The problems of the studies, by the names in their records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.training.problems.images import CifarResNet, FashionMLP
from benchmarks.training.problems.language import Language, shakespeare
from benchmarks.training.problems.problem import Problem


def _characters(data: Path) -> Problem:
    return Language(*shakespeare(data), width=64, depth=2, steps=800, rate=0.012)


PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "fash": FashionMLP,
    "lm2": _characters,
    "vis2": CifarResNet,
}
"""By name, a function from the folder of the data to the problem."""
