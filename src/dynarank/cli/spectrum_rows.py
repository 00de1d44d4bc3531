"""The table cells of ``dynarank spectrum``, for one checkpoint or two."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["COLUMNS", "PAIR_COLUMNS", "pair_cells", "single_cells"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_MEASURES = {
    "effective": ("effective_rank", ".1f"),
    "stable": ("stable_rank", ".1f"),
    "99%": ("energy_rank", ".0f"),
    "lambda": ("lambda", ".3f"),
}
COLUMNS = ["full", "effective", "of full", "stable", "99%", "lambda", "singular values"]
PAIR_COLUMNS = [heading for measure in _MEASURES for heading in (f"{measure} A", "B", "B - A")]


def single_cells(row: dict[str, Any]) -> list[str]:
    """The cells of one weight; the last is a sparkline of its singular values."""
    if not row["finite"]:
        return ["", "not finite", "", "", "", "", ""]
    return [
        str(row["full_rank"]),
        f"{row['effective_rank']:.1f}",
        f"{row['effective_rank'] / max(row['full_rank'], 1):.0%}",
        f"{row['stable_rank']:.1f}",
        str(row["energy_rank"]),
        f"{row['lambda']:.3f}",
        _sparkline(row["singular_values"]),
    ]


def pair_cells(first: dict[str, Any] | None, second: dict[str, Any] | None) -> list[str]:
    """Each metric of the first, of the second, and the difference; a dash for a missing layer."""
    cells: list[str] = []
    for name, pattern in _MEASURES.values():
        a, b = (_value(row, name) for row in (first, second))
        cells += [
            "-" if first is None else f"{a:{pattern}}",
            "-" if second is None else f"{b:{pattern}}",
            "" if math.isnan(b - a) else f"{b - a:+{pattern}}",
        ]
    return cells


def _value(row: dict[str, Any] | None, name: str) -> float:
    return float(row[name]) if row is not None and row["finite"] else math.nan


def _sparkline(values: list[float], width: int = 16) -> str:
    """The decay s_i / s1 at ``width`` points, as block characters."""
    if not values or not values[0] > 0:
        return ""
    places = [values[i * len(values) // width] / values[0] for i in range(min(width, len(values)))]
    return "".join(_BLOCKS[min(int(share * len(_BLOCKS)), len(_BLOCKS) - 1)] for share in places)
