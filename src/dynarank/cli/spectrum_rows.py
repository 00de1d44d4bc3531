"""The rows of ``dynarank spectrum``: rank metrics and advice as data for JSON and as cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynarank.cli.streaming import Column
from dynarank.decompositions import get_decomposition
from dynarank.files.printable import printable
from dynarank.forms import RankLike
from dynarank.monitors.file_spectra import WeightSpectrum, read_spectrum
from dynarank.monitors.rank_advice import RankAdvice, advise
from dynarank.monitors.singular_values import (
    effective_rank,
    energy_rank,
    spectral_ratio,
    stable_rank,
)
from dynarank.monitors.stored_weight import LeftOut, StoredWeight
from dynarank.monitors.stored_weights import Role, role_of, survey_files
from dynarank.monitors.weight_files import open_weights

__all__ = [
    "Model",
    "columns",
    "left_out_lines",
    "pair_cells",
    "pair_columns",
    "shape_text",
    "single_cells",
    "sparkline",
]

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK = 16  # characters
_LISTED = 8  # tensors left out that are listed by name


class Model:
    """A checkpoint: its weights by name, what was left out, and the spectra read so far.

    Args:
        path: the checkpoint.
        energy: the share of energy that ranks are to keep.
        rank: the rank of lambda.
        device: where to compute.
    """

    def __init__(self, path: Path, energy: float, rank: RankLike, device: torch.device) -> None:
        self.files = open_weights(path)
        found = survey_files(self.files)
        self.weights: dict[str, StoredWeight] = {w.name: w for w in found.weights}
        self.left_out: list[LeftOut] = found.left_out
        self.label = str(path)
        self._energy, self._rank, self._device = energy, rank, device
        self.values: dict[str, Tensor] = {}
        self.advice: list[RankAdvice] = []

    def row(self, name: str) -> dict[str, Any] | None:
        """The rank metrics of a weight and the advice on it; None if the checkpoint lacks it."""
        if name not in self.weights:
            return None
        weight = self.weights[name]
        spectrum = read_spectrum(self.files, weight, self._device)
        role = role_of(weight, self.files)
        row: dict[str, Any] = {"layer": name, "shape": list(weight.shape)}
        if spectrum.values is None:
            return row | {"finite": False}
        self.values[name] = spectrum.values
        advice = advise(weight, spectrum.values, self._energy, role)
        self.advice.append(advice)
        return row | {"finite": True} | self._metrics(spectrum) | _advice_data(advice, role)

    def _metrics(self, spectrum: WeightSpectrum) -> dict[str, Any]:
        assert spectrum.values is not None
        values = spectrum.values
        at = _lambda_rank(self._rank, spectrum.shape, len(values))
        return {
            "full_rank": len(values),
            "effective_rank": effective_rank(values),
            "stable_rank": stable_rank(values),
            "energy_rank": energy_rank(values, self._energy),
            "lambda": spectral_ratio(values, at),
            "lambda_rank": at,
        }


def _advice_data(advice: RankAdvice, role: Role) -> dict[str, Any]:
    return {
        "kind": advice.weight.kind,
        "role": role,
        "parameters": advice.weight.parameters,
        "break_even_rank": advice.break_even,
        "saved_parameters": advice.saved,
        "half_energy": advice.half_energy,
        "verdict": advice.verdict,
    }


def _lambda_rank(rank: RankLike, shape: tuple[int, ...], limit: int) -> int:
    """The rank of lambda: a share by the usual rule; an int is capped at the layer's limit."""
    svd = get_decomposition("svd")
    return min(rank, limit) if isinstance(rank, int) else svd.resolve_rank(rank, shape)


def columns(energy: float, with_lambda: bool, shapes: Sequence[str]) -> list[Column]:
    """The columns of one checkpoint; in a narrow terminal the sparkline goes first."""
    return [
        Column("shape", max(5, *map(len, shapes)), rank=1, left=True),
        Column("effective", rank=3),
        Column("of full", rank=4),
        Column(f"{100 * energy:.6g}%", rank=2),
        Column("break-even", rank=2),
        Column("saved", rank=4),
        *([Column("lambda", rank=1)] if with_lambda else []),
        Column("singular values", _SPARK, rank=5, left=True),
        Column("verdict", 22, left=True),
    ]


def single_cells(
    row: dict[str, Any], values: Sequence[float] | Tensor, with_lambda: bool
) -> list[str]:
    """The cells of one weight; the last but one is a sparkline of its singular values."""
    more = [""] if with_lambda else []
    shape = shape_text(row["shape"])
    if not row["finite"]:
        return [shape, *[""] * 5, *more, "", "not finite"]
    return [
        shape,
        f"{row['effective_rank']:.1f}",
        f"{row['effective_rank'] / max(row['full_rank'], 1):.0%}",
        str(row["energy_rank"]),
        str(row["break_even_rank"]),
        _amount(row["saved_parameters"]),
        *([f"{row['lambda']:.3f}"] if with_lambda else []),
        sparkline(values),
        str(row["verdict"]),
    ]


def _amount(count: int) -> str:
    """A number of parameters in at most six characters: 12,345 as 12.3k; a dash for none."""
    value = float(count)
    for unit in ("", "k", "M", "G"):
        if value < 999.95 or unit == "G":
            return "-" if not count else f"{value:.{1 if unit else 0}f}{unit}"
        value /= 1000
    return ""


_MEASURES = {"effective": ("effective_rank", ".1f"), "stable": ("stable_rank", ".1f")}


def _measures(energy: float, with_lambda: bool) -> dict[str, tuple[str, str]]:
    level = {f"{100 * energy:.6g}%": ("energy_rank", ".0f")}
    return _MEASURES | level | ({"lambda": ("lambda", ".3f")} if with_lambda else {})


def pair_columns(energy: float, with_lambda: bool, shapes: Sequence[str]) -> list[Column]:
    """The columns of two checkpoints side by side."""
    found = [Column("shape", max(5, *map(len, shapes)), rank=3, left=True)]
    for place, measure in enumerate(_measures(energy, with_lambda)):
        found += [Column(heading, rank=place) for heading in (f"{measure} A", "B", "B - A")]
    return found


def pair_cells(
    first: dict[str, Any] | None, second: dict[str, Any] | None, energy: float, with_lambda: bool
) -> list[str]:
    """Each metric of the first, of the second, and the difference; a dash for a missing layer."""
    found = [row for row in (first, second) if row is not None]
    cells = [" / ".join(dict.fromkeys(shape_text(row["shape"]) for row in found))]
    for name, pattern in _measures(energy, with_lambda).values():
        a, b = (_value(row, name) for row in (first, second))
        cells += [
            "-" if first is None else f"{a:{pattern}}",
            "-" if second is None else f"{b:{pattern}}",
            "" if math.isnan(b - a) else f"{b - a:+{pattern}}",
        ]
    return cells


def _value(row: dict[str, Any] | None, name: str) -> float:
    return float(row[name]) if row is not None and row["finite"] else math.nan


def sparkline(values: Sequence[float] | Tensor, width: int = _SPARK) -> str:
    """The decay s_i / s1 at ``width`` points, or at each value if there are fewer.

    Example:
        >>> sparkline([4.0, 2.0, 1.0])
        '█▅▃'
    """
    if not len(values) or not values[0] > 0:
        return ""
    width = min(width, len(values))
    places = [float(values[i * len(values) // width]) / float(values[0]) for i in range(width)]
    return "".join(_BLOCKS[min(int(share * len(_BLOCKS)), len(_BLOCKS) - 1)] for share in places)


def shape_text(shape: Sequence[int]) -> str:
    """A shape in a cell: ``64x3x3x3``."""
    return "x".join(map(str, shape))


def left_out_lines(model: Model) -> list[str]:
    """What was left out and why, one line for each tensor up to a few."""
    lines = [
        f"Left out: {printable(one.name)} ({one.dtype} {shape_text(one.shape)}): {one.reason}"
        for one in model.left_out[:_LISTED]
    ]
    if (more := len(model.left_out) - len(lines)) > 0:
        lines.append(f"Left out: {more} more tensors, all in --json")
    return lines
