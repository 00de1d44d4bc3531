"""``dynarank spectrum``: the rank health of any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from dynarank.cli.show import console, right_aligned
from dynarank.forms import resolve_rank
from dynarank.report.spectra import spectrum_figure
from dynarank.spectrum import effective_rank, energy_rank, spectral_ratio, stable_rank
from dynarank.weights import WeightSpectrum, file_spectra

__all__ = ["spectrum"]

_FORMATS = (".png", ".svg", ".pdf")
_BLOCKS = "▁▂▃▄▅▆▇█"


def spectrum(
    file: Annotated[Path, typer.Argument(help="A .safetensors file of any model's weights.")],
    rank: Annotated[
        float,
        typer.Option(help="Where lambda is taken: a share of the outputs up to 1, else a rank."),
    ] = 0.5,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture file (.png, .svg, .pdf); default: STEM-spectrum.png."),
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Write no picture.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, singular values included.")
    ] = False,
) -> None:
    """Rank health of every weight in FILE: a table and a picture.

    Effective rank is exp of the entropy of s / sum s, stable rank sum s^2 / s1^2, energy rank the
    directions that hold 99% of sum s^2, lambda the first r singular values' share of sum s. Each
    is of the weight as a matrix, out x (in * kernel positions).
    """
    if not 0 < rank < float("inf"):
        raise ValueError(f"--rank is a share up to 1 or a number of directions, got {rank}")
    if plot is not None and (not plot.parent.is_dir() or plot.suffix not in _FORMATS):
        raise ValueError(
            f"--plot wants a file in a folder there is, ending in {_FORMATS}; got {plot}"
        )
    spectra = list(file_spectra(file))
    rows = [_row(weight, rank) for weight in spectra]
    terminal = console(quiet_stdout=as_json)
    if as_json:
        print(json.dumps({"file": str(file), "layers": rows}, indent=2))
    else:
        _show(terminal, file, rows)
    if not no_plot:
        _picture(terminal, plot or Path(f"{file.stem}-spectrum.png"), spectra)


def _row(weight: WeightSpectrum, rank: float) -> dict[str, Any]:
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


def _lambda_rank(rank: float, shape: tuple[int, ...], limit: int) -> int:
    """A share means what it means everywhere; a number is cut at each layer's limit."""
    return resolve_rank(rank, shape) if rank <= 1 else min(int(rank), limit)


def _show(terminal: Console, file: Path, rows: list[dict[str, Any]]) -> None:
    numbers = ["full", "effective", "of full", "stable", "99%", "lambda"]
    table = right_aligned(escape(f"Rank health of {file.name}"), ["layer", "shape"], numbers)
    table.add_column("singular values", no_wrap=True)
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        if not row["finite"]:
            table.add_row(Text(row["layer"]), shape, "", "not finite", "", "", "", "", "")
            continue
        table.add_row(
            Text(row["layer"]),
            shape,
            str(row["full_rank"]),
            f"{row['effective_rank']:.1f}",
            f"{row['effective_rank'] / max(row['full_rank'], 1):.0%}",
            f"{row['stable_rank']:.1f}",
            str(row["energy_rank"]),
            f"{row['lambda']:.3f}",
            _sparkline(row["singular_values"]),
        )
    terminal.print(table)


def _sparkline(values: list[float], width: int = 16) -> str:
    """The decay s_i / s1 at ``width`` places, as block characters."""
    if not values or not values[0] > 0:
        return ""
    places = [values[i * len(values) // width] / values[0] for i in range(min(width, len(values)))]
    return "".join(_BLOCKS[min(int(share * len(_BLOCKS)), len(_BLOCKS) - 1)] for share in places)


def _picture(terminal: Console, place: Path, spectra: list[WeightSpectrum]) -> None:
    values = {weight.name: weight.values for weight in spectra if weight.values is not None}
    if not values:
        return
    try:
        figure = spectrum_figure({name: v.tolist() for name, v in values.items()})
        figure.savefig(place)
        terminal.print(f"Picture: {place}")
    except ImportError as error:
        terminal.print(f"No picture: {error}")
