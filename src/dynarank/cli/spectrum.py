"""``dynarank spectrum``: rank metrics of any checkpoint, or of two side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dynarank.cli.options import RANK_HELP, parse_rank
from dynarank.cli.show import console
from dynarank.cli.streaming import StreamedTable
from dynarank.decompositions import get_decomposition
from dynarank.files.reading import DamagedFileError, sha256
from dynarank.forms import RankLike
from dynarank.monitors.file_spectra import WeightSpectrum, read_spectrum
from dynarank.monitors.singular_values import (
    effective_rank,
    energy_rank,
    spectral_ratio,
    stable_rank,
)
from dynarank.monitors.stored_weight import StoredWeight
from dynarank.monitors.stored_weights import stored_weights
from dynarank.monitors.weight_files import WeightFiles, open_weights
from dynarank.records import read_run
from dynarank.report.plotting import save_figure
from dynarank.report.spectra import spectrum_figure
from dynarank.report.spectra_pair import spectrum_pair_figure

__all__ = ["spectrum"]

_FORMATS = (".png", ".svg", ".pdf")
_BLOCKS = "▁▂▃▄▅▆▇█"
_MEASURES = {
    "effective": ("effective_rank", ".1f"),
    "stable": ("stable_rank", ".1f"),
    "99%": ("energy_rank", ".0f"),
    "lambda": ("lambda", ".3f"),
}
_COLUMNS = ["full", "effective", "of full", "stable", "99%", "lambda", "singular values"]
_PAIR_COLUMNS = [heading for measure in _MEASURES for heading in (f"{measure} A", "B", "B - A")]


def spectrum(
    file: Annotated[
        Path,
        typer.Argument(help="A .safetensors file, a sharded Hugging Face folder, or a run folder."),
    ],
    other: Annotated[
        Path | None,
        typer.Argument(help="A second checkpoint to compare with, layers matched by name."),
    ] = None,
    rank: Annotated[
        float,
        typer.Option(parser=parse_rank, metavar="RANK", help=f"The rank r of lambda: {RANK_HELP}"),
    ] = "0.5:out",  # pyright: ignore[reportArgumentType]
    plot: Annotated[
        Path | None,
        typer.Option(help="Figure file (.png, .svg, .pdf); default: STEM-spectrum.png."),
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Write no figure.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, singular values included.")
    ] = False,
) -> None:
    """Rank metrics of every weight in FILE: a table and a figure.

    One weight is in memory at a time, and each row is printed as soon as it is ready.

    From the singular values s of each weight as a matrix, out x (in * kernel positions): effective
    rank is exp of the entropy of s / sum s; stable rank is sum s^2 / s1^2; 99% is the energy rank,
    the fewest singular values with 99% of sum s^2; lambda is the share of sum s in the first r.
    The factors of a low-rank layer are multiplied first.
    """
    if plot is not None and (not plot.parent.is_dir() or plot.suffix not in _FORMATS):
        raise ValueError(
            f"--plot must be a file in an existing folder, ending in {_FORMATS}; got {plot}"
        )
    paths = [file] if other is None else [file, other]
    for path in paths:
        _verify(path)
    models = [_Model(path, rank) for path in paths]
    terminal = console(quiet_stdout=as_json)
    rows = list(_rows(models, terminal, None if as_json else _title(paths)))
    if as_json:
        key: dict[str, Any] = (
            {"file": str(file)} if other is None else {"files": [*map(str, paths)]}
        )
        print(json.dumps({**key, "layers": rows}, indent=2))
    if not no_plot:
        stem = "-".join(dict.fromkeys(_stem(path) for path in paths))
        _save_figure(terminal, plot or Path(f"{stem}-spectrum.png"), models)


def _verify(path: Path) -> None:
    """Compare the weights of a run with the digest in its records.

    Raises:
        DamagedFileError: they are not those that were written.
    """
    weights = path / "model.safetensors"
    if not ((path / "records.jsonl").is_file() and weights.is_file()):
        return
    try:
        summary = read_run(path).summary
    except DamagedFileError:  # says nothing of the weights
        return
    if summary and summary.model_sha256 and sha256(weights.resolve()) != summary.model_sha256:
        raise DamagedFileError(
            weights,
            "it has changed since the run was written (another SHA-256 in its records)",
            "name the file itself to read it all the same",
        )


class _Model:
    """A checkpoint: its weights by name, and the spectra read so far."""

    def __init__(self, path: Path, rank: RankLike) -> None:
        self.files: WeightFiles = open_weights(path)
        self.weights: dict[str, StoredWeight] = {w.name: w for w in stored_weights(self.files)}
        self.label, self._rank = str(path), rank
        self.values: dict[str, list[float]] = {}

    def row(self, name: str) -> dict[str, Any] | None:
        """The rank metrics of a weight; None if the checkpoint lacks it."""
        if name not in self.weights:
            return None
        spectrum = read_spectrum(self.files, self.weights[name])
        if spectrum.values is not None:
            self.values[name] = spectrum.values.tolist()
        return _row(spectrum, self._rank)


def _rows(models: list[_Model], terminal: Console, title: str | None) -> Iterator[dict[str, Any]]:
    """Yield a row for each weight; printed as it comes if there is a title."""
    names = list(dict.fromkeys(name for model in models for name in model.weights))
    shapes = [
        _shape(model.weights[n].shape) for n in names for model in models if n in model.weights
    ]
    columns = _COLUMNS if len(models) == 1 else _PAIR_COLUMNS
    with StreamedTable(terminal, title, columns, names, shapes) as table:
        for name in names:
            table.working_on(name)
            found = [model.row(name) for model in models]
            if len(found) == 1:
                assert found[0] is not None
                row, cells = found[0], _single_cells(found[0])
            else:
                row = {"layer": name, "first": found[0], "second": found[1]}
                cells = _pair_cells(found[0], found[1])
            table.add(name, _shapes(found), cells)
            yield row


def _row(weight: WeightSpectrum, rank: RankLike) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": weight.name, "shape": list(weight.shape)}
    if weight.values is None:
        return row | {"finite": False}
    values = weight.values
    at = _lambda_rank(rank, weight.shape, len(values))
    return row | {
        "finite": True,
        "full_rank": len(values),
        "effective_rank": effective_rank(values),
        "stable_rank": stable_rank(values),
        "energy_rank": energy_rank(values),
        "lambda": spectral_ratio(values, at),
        "lambda_rank": at,
        "singular_values": values.tolist(),
    }


def _single_cells(row: dict[str, Any]) -> list[str]:
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


def _pair_cells(first: dict[str, Any] | None, second: dict[str, Any] | None) -> list[str]:
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


def _lambda_rank(rank: RankLike, shape: tuple[int, ...], limit: int) -> int:
    """The rank of lambda: a share by the usual rule; an int is capped at the layer's limit."""
    svd = get_decomposition("svd")
    return min(rank, limit) if isinstance(rank, int) else svd.resolve_rank(rank, shape)


def _shape(shape: tuple[int, ...] | list[int]) -> str:
    return "x".join(map(str, shape))


def _shapes(found: list[dict[str, Any] | None]) -> str:
    """The shape, or both where they differ."""
    return " / ".join(dict.fromkeys(_shape(row["shape"]) for row in found if row is not None))


def _title(paths: list[Path]) -> str:
    if len(paths) == 1:
        return f"Rank metrics of {paths[0].name or paths[0]}"
    return f"Rank metrics: A = {paths[0]}, B = {paths[1]}"


def _stem(path: Path) -> str:
    """The stem of the figure's file name: that of the file, or the folder's name."""
    path = path.resolve()
    return path.name if path.is_dir() else path.name.split(".", 1)[0]


def _save_figure(terminal: Console, place: Path, models: list[_Model]) -> None:
    if not any(model.values for model in models):
        return
    try:
        if len(models) == 1:
            figure = spectrum_figure(models[0].values)
        else:
            figure = spectrum_pair_figure({model.label: model.values for model in models})
        save_figure(figure, place)
        terminal.print(f"Figure: {place}", soft_wrap=True, markup=False)
    except ImportError as error:
        terminal.print(f"No figure: {error}", markup=False)
