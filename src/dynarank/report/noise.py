"""The gradient noise scale against epochs, with the batch size for comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynarank.records import NoiseRecord, Run
from dynarank.report.colors import schedule_colors
from dynarank.report.grouping import by_schedule
from dynarank.report.legends import legend_below, line
from dynarank.report.plotting import display_names, new_figure, plain_tick, point_markers, styled
from dynarank.report.theme import NEUTRAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["noise_figure"]


@styled
def noise_figure(
    runs: Sequence[Run], narrow: bool = False, colors: Mapping[str, str] | None = None
) -> Figure:
    """Plot each run's noise scale in samples, on a log axis; the batch size is dashed.

    Readings that are not finite, where noise drowned the gradient, are left out.

    Args:
        runs: those with noise readings.
        narrow: for a phone.
        colors: of the schedules of all runs; default: of these.
    """
    from matplotlib.ticker import FuncFormatter

    shown = by_schedule(runs)
    colors = colors or schedule_colors(shown)
    figure = new_figure(4.6 if narrow else 9.5, 3.4)
    axes = figure.subplots()
    for run in runs:
        found = [r for r in run.all(NoiseRecord) if math.isfinite(r.noise_scale)]
        axes.plot(
            [r.epoch for r in found],
            [r.noise_scale for r in found],
            color=colors[run.header.schedule],
            **point_markers([r.noise_scale for r in found]),
        )
    batches = {run.config.get("recipe", {}).get("batch_size") for run in runs} - {None}
    for batch in batches:
        axes.axhline(batch, color=NEUTRAL, linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(plain_tick))
    axes.set(xlabel="epoch", ylabel="samples", title="Gradient noise scale")
    entries = [
        (line(colors[name]), label)
        for name, label in zip(shown, display_names(list(shown)), strict=True)
    ]
    legend_below(figure, [*entries, (line(NEUTRAL, "--"), "batch size")] if batches else entries)
    return figure
