"""All figures of a report by name, and writing them to image files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynarank.files.atomic import make_folder
from dynarank.files.printable import printable
from dynarank.records import (
    HeatmapRecord,
    NoiseRecord,
    Run,
    SpectrumRecord,
    read_runs,
)
from dynarank.report.colors import schedule_colors
from dynarank.report.cost_quality import cost_quality_figure
from dynarank.report.curves import curves_figure, has_curves
from dynarank.report.grouping import by_schedule, comparable, final_scores, first_of_each
from dynarank.report.heatmaps import heatmaps_figure
from dynarank.report.layer_forms import layer_names
from dynarank.report.noise import noise_figure
from dynarank.report.plotting import require_matplotlib, save_figure
from dynarank.report.rank_metrics import rank_metrics_figure
from dynarank.report.rank_timeline import rank_timeline_figure
from dynarank.report.spectra_over_time import spectra_over_time_figure, spectrum_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "MOST_SCHEDULES", "figures_of", "write_figures"]

FORMATS = ("png", "svg", "pdf")
MOST_SCHEDULES = 6  # side by side, in figures with one panel per schedule


def write_figures(
    folder: str | Path,
    target: str | Path,
    formats: Sequence[str] = FORMATS[:2],
    *,
    warn: Callable[[str], None] = warnings.warn,
) -> list[Path]:
    """Write each figure of the runs at or below ``folder`` to a file of its own in ``target``.

    Args:
        folder: a run folder, or a folder of them.
        target: the folder to write to; created if missing.
        formats: any of ``png``, ``svg`` and ``pdf``.
        warn: called with what cannot be read or drawn.

    Raises:
        ValueError: an unknown format, or runs with different metrics.
        FileNotFoundError: there is no run at or below ``folder``.
        DamagedFileError: none of the runs can be read.
        ImportError: matplotlib is not installed; the message names the extra that brings it.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        asked = ", ".join(unknown) or "none"
        raise ValueError(f"figures are written as {', '.join(FORMATS)}; asked for: {asked}")
    require_matplotlib()
    target = Path(target)
    found, unreadable = read_runs(Path(folder))
    for told in unreadable:
        warn(told)
    runs = comparable(found)
    make_folder(target)
    written: list[Path] = []
    for name, draw in figures_of(runs):
        try:
            figure = draw()
            for ending in formats:
                path = target / f"{name}.{ending}"
                _save(figure, path)
                written.append(path)
        except OSError:
            raise
        except Exception as error:
            warn(f"figure {name} cannot be drawn: {type(error).__name__}: {printable(str(error))}")
    return written


def figures_of(runs: Sequence[Run]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """The figures for which the runs have data: each a name and a function that draws it."""
    chosen = first_of_each(runs)[:MOST_SCHEDULES]
    watched = [run for run in chosen if run.all(SpectrumRecord)]
    banded = [run for run in chosen if layer_names(run)]
    colors = schedule_colors(by_schedule(runs))
    if has_curves(runs):
        yield "curves", lambda: curves_figure(runs)
    if final_scores(runs):
        yield "cost-quality", lambda: cost_quality_figure(runs)
    if watched:
        yield "rank-metrics", lambda: rank_metrics_figure(watched)
    noisy = [run for run in chosen if run.all(NoiseRecord)]
    if noisy:
        yield "noise", lambda: noise_figure(noisy, colors=colors)
    if banded:
        yield "rank-timeline", lambda: rank_timeline_figure(banded)
    for run in chosen:
        if spectrum_names(run):
            yield f"spectra-{_slug(run)}", lambda run=run: spectra_over_time_figure(run)
        if run.all(HeatmapRecord):
            yield f"heatmaps-{_slug(run)}", lambda run=run: heatmaps_figure(run)


def _slug(run: Run) -> str:
    """A schedule's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", run.header.schedule).strip("-.") or "run"


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import rc_context

    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(path.suffix[1:], {})
    with rc_context({"svg.hashsalt": "dynarank", "svg.fonttype": "none"}):
        save_figure(figure, path, dpi=200, metadata=metadata)
