"""``dynarank spectrum``: rank metrics of any checkpoint and what to cut, or two side by side."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from dynarank.cli.options import RANK_HELP, parse_rank
from dynarank.cli.show import console, print_json
from dynarank.cli.spectrum_rows import (
    Model,
    columns,
    left_out_lines,
    pair_cells,
    pair_columns,
    shape_text,
    single_cells,
)
from dynarank.cli.streaming import StreamedTable
from dynarank.files.atomic import write_text
from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError, sha256
from dynarank.forms import RankLike
from dynarank.monitors.rank_advice import plan_text, suggested_plan, summary_lines
from dynarank.records import read_run
from dynarank.report.formats import plural
from dynarank.report.plotting import save_figure
from dynarank.report.spectra import spectrum_figure
from dynarank.report.spectra_pair import spectrum_pair_figure

__all__ = ["spectrum"]

_FORMATS = (".png", ".svg", ".pdf")
_LAMBDA = "0.5:out"


def spectrum(
    file: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors, .bin, .pt or .pth file, a Hugging Face folder, or a run folder."
        ),
    ],
    other: Annotated[
        Path | None,
        typer.Argument(help="A second checkpoint to compare with, layers matched by name."),
    ] = None,
    energy: Annotated[
        float, typer.Option(help="The share of each weight's energy that a rank is to keep.")
    ] = 0.99,
    suggest: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.json", help="Write the plan that cuts where rank saves."),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only layers whose name matches; repeatable."),
    ] = None,
    rank: Annotated[
        float | None,
        typer.Option(
            parser=parse_rank, metavar="RANK", help=f"Show lambda, at this rank: {RANK_HELP}"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    plot: Annotated[
        Path | None,
        typer.Option(help="Figure file (.png, .svg, .pdf); default: STEM-spectrum.png."),
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Write no figure.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, singular values included.")
    ] = False,
) -> None:
    """Rank metrics of every weight in FILE and which to cut: a table and a figure.

    One weight is in memory at a time, and each row is printed as soon as it is ready.

    From the singular values s of each weight as a matrix, out x (in * kernel positions): effective
    rank is exp of the entropy of s / sum s; 99% is the energy rank, the fewest singular values with
    99% of sum s^2; below the break-even rank two factors have fewer parameters than the weight.
    Stable rank is sum s^2 / s1^2; lambda is the share of sum s in the first r. Factors, scales and
    norms are multiplied first. Energy is not accuracy: evaluate what is cut.
    """
    paths = [file] if other is None else [file, other]
    _check(paths, energy, suggest, plot)
    place = _device(device)
    for path in paths:
        _verify(path)
    at: RankLike = parse_rank(_LAMBDA) if rank is None else rank
    models = [Model(path, energy, at, place) for path in paths]
    names = _named(models, layers)
    terminal = console(quiet_stdout=as_json)
    table = _Table(models, names, energy, rank is not None)
    rows = list(table.rows(terminal, None if as_json else _title(paths)))
    if as_json:
        print_json(_data(paths, models, energy, rows))
    else:
        _print_foot(terminal, models)
    if suggest is not None:
        _write_plan(terminal, suggest, models[0])
    if not no_plot:
        stem = "-".join(dict.fromkeys(_stem(path) for path in paths))
        _save_figure(terminal, plot or Path(f"{stem}-spectrum.png"), models)


def _check(paths: list[Path], energy: float, suggest: Path | None, plot: Path | None) -> None:
    """Refuse what cannot be done, before anything is read."""
    if plot is not None and (not plot.parent.is_dir() or plot.suffix not in _FORMATS):
        raise ValueError(
            f"--plot must be a file in an existing folder, ending in {_FORMATS}; got {plot}"
        )
    if not 0 < energy <= 1:
        raise ValueError(f"--energy is a share above 0 and up to 1, such as 0.99; got {energy}")
    if suggest is None:
        return
    if len(paths) > 1:
        raise ValueError("--suggest is for one file: name the one that is to be cut")
    if not suggest.parent.is_dir() or suggest.is_dir():
        raise ValueError(
            f"--suggest must be a file in an existing folder, got {suggest}; pass another"
        )
    if not os.access(suggest.parent, os.W_OK):
        raise ValueError(
            f"--suggest: the folder {suggest.parent} cannot be written to; name another"
        )


def _device(name: str) -> torch.device:
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {told}") from error
    return found


def _named(models: list[Model], patterns: list[str] | None) -> list[str]:
    """The names of the weights in order, those that a pattern matches if there are any.

    Raises:
        ValueError: a pattern matches nothing.
    """
    names = list(dict.fromkeys(name for model in models for name in model.weights))
    if not patterns:
        return names
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.4)
            shown = ", ".join(map(printable, near or names[:3]))
            raise ValueError(
                f"--layers {pattern!r} matches no layer; there is, for example: {shown}"
            )
    return [name for name in names if any(_matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # experts.up_proj[3] is a name too


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


class _Table:
    """The table of one checkpoint or of two."""

    def __init__(
        self, models: list[Model], names: list[str], energy: float, with_lambda: bool
    ) -> None:
        self._models, self._names = models, names
        self._energy, self._lambda = energy, with_lambda
        found = [m.weights[n] for n in names for m in models if n in m.weights]
        make = columns if len(models) == 1 else pair_columns
        shapes = [shape_text(weight.shape) for weight in found]
        self._columns = make(energy, with_lambda, shapes)

    def rows(self, terminal: Console, title: str | None) -> Iterator[dict[str, Any]]:
        """Yield the data of each weight; printed as it comes if there is a title."""
        work = [sum(map(_work, (m.weights.get(n) for m in self._models))) for n in self._names]
        with StreamedTable(terminal, title, self._columns, self._names, work) as table:
            for name in self._names:
                table.working_on(name)
                rows = [model.row(name) for model in self._models]
                table.add(name, self._cells(name, rows))
                yield self._data(name, rows)

    def _cells(self, name: str, rows: list[dict[str, Any] | None]) -> list[str]:
        if len(rows) == 2:
            return pair_cells(rows[0], rows[1], self._energy, self._lambda)
        assert rows[0] is not None
        values = self._models[0].values.get(name)
        return single_cells(rows[0], [] if values is None else values, self._lambda)

    def _data(self, name: str, rows: list[dict[str, Any] | None]) -> dict[str, Any]:
        if len(rows) == 1:
            assert rows[0] is not None
            return rows[0]
        return {"layer": name, "first": rows[0], "second": rows[1]}


def _work(weight: Any) -> float:
    """About the FLOPs of a spectrum: the Gram matrix of the shorter side, and its eigenvalues."""
    if weight is None:
        return 0.0
    side, other = sorted(weight.matrix)
    return float(side) * side * (other + 3 * side) + 1


def _data(
    paths: list[Path], models: list[Model], energy: float, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The whole answer for JSON, singular values included."""
    pair = len(paths) == 2
    for row in rows:
        parts = [row["first"], row["second"]] if pair else [row]
        for model, part in zip(models, parts, strict=True):
            if part and part["finite"]:
                part["singular_values"] = model.values[row["layer"]].tolist()
    left_out = [[vars(one) for one in model.left_out] for model in models]
    if pair:
        return {"files": [*map(str, paths)], "energy": energy, "layers": rows, "left_out": left_out}
    return {
        "file": str(paths[0]),
        "energy": energy,
        "layers": rows,
        "left_out": left_out[0],
        "summary": summary_lines(models[0].advice),
        "plan": suggested_plan(models[0].advice),
    }


def _print_foot(terminal: Console, models: list[Model]) -> None:
    """What the table adds up to, for one checkpoint, and what it leaves out."""
    lines = summary_lines(models[0].advice) if len(models) == 1 else _unlike(*models)
    for model in models:
        lines += left_out_lines(model)
    for line in lines:
        terminal.print(line, soft_wrap=not terminal.is_terminal, markup=False)


def _unlike(first: Model, second: Model) -> list[str]:
    """A word where two checkpoints have no name in common, such as with another prefix."""
    if first.weights.keys() & second.weights.keys():
        return []
    a, b = (printable(next(iter(model.weights))) for model in (first, second))
    return [f"No weight has the same name in A and B, which begin with {a} and {b}."]


def _write_plan(terminal: Console, place: Path, model: Model) -> None:
    """Write the suggested plan, and say which cuts are not in it."""
    plan = suggested_plan(model.advice)
    write_text(place, plan_text(model.advice))
    terminal.print(f"Plan: {place}, {plural(len(plan), 'layer')}", soft_wrap=True, markup=False)
    if other := sum(one.cuts for one in model.advice) - len(plan):
        told = (
            f"Not in the plan: {other} weights that are rebuilt, single experts or bare parameters"
        )
        terminal.print(told, soft_wrap=True, markup=False)


def _title(paths: list[Path]) -> str:
    if len(paths) == 1:
        return f"Rank metrics of {paths[0].name or paths[0]}"
    return f"Rank metrics: A = {paths[0]}, B = {paths[1]}"


def _stem(path: Path) -> str:
    """The stem of the figure's file name: that of the file, or the folder's name."""
    path = path.resolve()
    return path.name if path.is_dir() else path.name.split(".", 1)[0]


def _save_figure(terminal: Console, place: Path, models: list[Model]) -> None:
    """Draw the figure; where it cannot be drawn or written, the answer stands all the same."""
    spectra = [{name: v.tolist() for name, v in model.values.items()} for model in models]
    if not any(spectra):
        return
    try:
        if len(models) == 1:
            figure = spectrum_figure(spectra[0])
        else:
            labels = [model.label for model in models]
            figure = spectrum_pair_figure(dict(zip(labels, spectra, strict=True)))
        with warnings.catch_warnings():  # a name may hold letters that the font lacks
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            save_figure(figure, place)
        terminal.print(f"Figure: {place}", soft_wrap=True, markup=False)
    except (ImportError, OSError, ValueError) as error:
        terminal.print(f"No figure: {error}", soft_wrap=True, markup=False)
