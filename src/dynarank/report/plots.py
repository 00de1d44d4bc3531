"""Figures of runs: learning curves, rank over time, cost. Pure functions of the records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from dynarank.records import EpochRecord, LayerSpectrum, Run, SpectrumRecord
from dynarank.report.drawing import (
    INK,
    NEUTRAL,
    depth_colormap,
    new_figure,
    palette,
    percent_tick,
    plain_tick,
    shown,
    styled,
)
from dynarank.report.marks import (
    FORM_SHADES,
    change_marks,
    full_rank_spans,
    mark_labels,
    mark_lines,
    shade,
)
from dynarank.report.moments import by_schedule, last_epoch, spans
from dynarank.report.scatter import cost_figure
from dynarank.report.spectra import spectrum_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cost_figure", "curves_figure", "ranks_figure", "spectrum_figure"]

FEW_LAYERS = 4
_PANEL = 4.2  # inches of axes in one panel of the curves


@styled
def curves_figure(runs: Sequence[Run]) -> Figure:
    """Test accuracy, and training and test loss, against epochs: one colour a schedule.

    Dashed vertical lines mark changes of form; full-rank phases between them are shaded.
    """
    grouped = by_schedule(runs)
    colours = palette(list(grouped))
    figure = new_figure(9.5, 4.0)
    accuracy, loss = figure.subplots(1, 2)
    for run in runs:
        colour, epochs = colours[run.header.schedule], run.all(EpochRecord)
        _curve(accuracy, epochs, lambda epoch: epoch.test_score, colour, "-")
        _curve(loss, epochs, lambda epoch: epoch.test_loss, colour, "-")
        _curve(loss, epochs, lambda epoch: epoch.train_loss, colour, ":")
    _percent_axis(accuracy)
    _maybe_log(loss)
    _dress_curves((accuracy, loss), runs, colours)
    named = [(_line(colour), _counted(name, grouped[name])) for name, colour in colours.items()]
    _legend_below(figure, [*named, *_curve_keys(runs)])
    return figure


@styled
def ranks_figure(runs: Sequence[Run]) -> Figure:
    """Lambda and effective rank of each layer over time: a row a measure, a column a run.

    The effective rank is divided by the layer's full rank, so that layers share an axis. Up to
    four layers are named in a legend; more are coloured by depth, with their median in black.
    """
    figure = new_figure(max(9.5, 2.4 * len(runs)), 5.6)
    grid = figure.subplots(2, len(runs), sharey="row", sharex=True, squeeze=False)
    names = _layer_names(runs)
    for (top, bottom), run in zip(grid.T, runs, strict=True):
        _layer_lines(top, run, names, lambda layer: layer.spectral_ratio)
        _layer_lines(bottom, run, names, lambda layer: layer.effective_rank / layer.full_rank)
    _dress_columns(list(grid[0]), list(grid[1]), runs)
    grid[0, 0].set_ylabel("λ: share of Σ s within\nthe layer's low rank")
    grid[1, 0].set_ylabel("effective rank / full rank")
    keys = _layer_keys(names)
    _legend_below(figure, [*keys, *_phase_keys(runs)])
    if len(names) > FEW_LAYERS:
        _depth_bar(figure, list(grid.flat), len(names))
    return figure


def _curve(
    axes: Axes,
    epochs: Sequence[EpochRecord],
    value: Callable[[EpochRecord], float],
    colour: str,
    line: str,
) -> None:
    axes.plot(
        [epoch.epoch for epoch in epochs],
        [_finite(value(epoch)) for epoch in epochs],
        color=colour,
        linestyle=line,
        linewidth=1.6 if line == "-" else 1.2,
        alpha=0.85,
        marker="o" if len(epochs) <= 12 else None,
        markersize=3,
    )


def _finite(value: float) -> float:
    """Leave a gap: a diverged run has infinite losses, which no axis can hold."""
    return value if math.isfinite(value) else math.nan


def _percent_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(percent_tick))


def _maybe_log(axes: Axes) -> None:
    """Make the axis logarithmic where the curves span more than a factor of thirty."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [float(y) for line in axes.get_lines() for y in line.get_ydata()]  # type: ignore[union-attr]
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(plain_tick))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _dress_curves(panels: tuple[Axes, Axes], runs: Sequence[Run], colours: dict[str, str]) -> None:
    marks = change_marks(runs, colours)
    stretches = full_rank_spans(runs)
    end = max((last_epoch(run) for run in runs), default=0) or 1
    for axes, title in zip(panels, ("Test accuracy", "Loss"), strict=True):
        if len(stretches) <= 6:
            shade(axes, stretches, FORM_SHADES)
        axes.set_xlim(0, end)
        axes.set_xlabel("epoch")
        mark_lines(axes, marks)
        axes.set_title(title, pad=6 + mark_labels(axes, marks, end, _PANEL))


def _counted(name: str, runs: Sequence[Run]) -> str:
    return shown(name) if len(runs) == 1 else f"{shown(name)} ({len(runs)} runs)"


def _curve_keys(runs: Sequence[Run]) -> list[tuple[Artist, str]]:
    keys: list[tuple[Artist, str]] = [
        (_line(NEUTRAL), "test"),
        (_line(NEUTRAL, ":"), "training"),
    ]
    if 0 < len(full_rank_spans(runs)) <= 6:
        keys.append((_patch(FORM_SHADES["full-rank"]), "full-rank phase"))
    return keys


def _layer_names(runs: Sequence[Run]) -> list[str]:
    """List the watched layers of all runs, in order of depth."""
    records = [record for run in runs for record in run.all(SpectrumRecord)]
    return list(dict.fromkeys(name for record in records for name in record.layers))


def _layer_colours(names: Sequence[str]) -> dict[str, str]:
    """Colour layers by depth: not in the colours that stand for schedules."""
    from matplotlib.colors import to_hex

    scale = depth_colormap()
    return {name: to_hex(scale(i / max(len(names) - 1, 1))) for i, name in enumerate(names)}


def _layer_lines(
    axes: Axes, run: Run, names: Sequence[str], value: Callable[[LayerSpectrum], float]
) -> None:
    """Draw a line a layer; also their median where they are too many to tell apart."""
    records = run.all(SpectrumRecord)
    epochs = [record.epoch for record in records]
    many = len(names) > FEW_LAYERS
    for name, colour in _layer_colours(names).items():
        layers = [record.layers.get(name) for record in records]
        axes.plot(
            epochs,
            [math.nan if layer is None else _finite(value(layer)) for layer in layers],
            color=colour,
            linewidth=max(0.5, 1.4 - len(names) / 60) if many else 1.6,
            alpha=0.75 if many else 1,
        )
    if many and records:
        medians = [_median([value(layer) for layer in r.layers.values()]) for r in records]
        axes.plot(epochs, medians, color="black", linewidth=1.8)


def _median(values: Sequence[float]) -> float:
    """Find the upper median of the finite values."""
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else math.nan


def _dress_columns(top: list[Axes], bottom: list[Axes], runs: Sequence[Run]) -> None:
    """Draw phases, changes and titles: titles at one height, above the labels of changes."""
    end = max(last_epoch(run) for run in runs) or 1
    rise = 0.0
    for upper, lower, run in zip(top, bottom, runs, strict=True):
        marks = change_marks([run], {run.header.schedule: INK})
        for axes in (upper, lower):
            shade(axes, spans(run), FORM_SHADES)
            mark_lines(axes, marks)
        lower.set(xlim=(0, end), xlabel="epoch")
        rise = max(rise, mark_labels(upper, marks, end, max(8.5 / len(runs), 2)))
    for axes, run in zip(top, runs, strict=True):
        axes.set_title(shown(run.header.schedule), pad=6 + rise)


def _layer_keys(names: Sequence[str]) -> list[tuple[Artist, str]]:
    if len(names) > FEW_LAYERS:
        return [(_line("black"), "median of the layers")]
    return [(_line(colour), shown(name)) for name, colour in _layer_colours(names).items()]


def _phase_keys(runs: Sequence[Run]) -> list[tuple[Artist, str]]:
    present = {span.form for run in runs for span in spans(run)}
    keys = [(form, colour) for form, colour in FORM_SHADES.items() if form in present]
    return [(_patch(colour), f"{form} phase") for form, colour in keys]


def _depth_bar(figure: Figure, panels: Sequence[Axes], layers: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    mapped = ScalarMappable(Normalize(1, layers), depth_colormap())
    bar = figure.colorbar(mapped, ax=panels, pad=0.015, aspect=40)
    bar.set_label(f"depth: layer 1 (first) to {layers} (last)")
    bar.set_ticks(
        [1, layers] if layers < 8 else [1, layers // 4, layers // 2, 3 * layers // 4, layers]
    )
    bar.outline.set_visible(False)  # type: ignore[operator]


def _line(colour: str, style: Literal["-", ":"] = "-") -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, linewidth=1.8)


def _patch(colour: str) -> Artist:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour)


def _legend_below(figure: Figure, keys: Sequence[tuple[Artist, str]]) -> None:
    if keys:
        handles, labels = zip(*keys, strict=True)
        rows = math.ceil(len(keys) / 7)
        columns = math.ceil(len(keys) / rows)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
