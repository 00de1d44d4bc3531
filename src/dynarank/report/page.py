"""The report page: one self-contained HTML file with style, scripts and figures inline."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from string import Template

from dynarank.files.atomic import make_folder, write_text
from dynarank.files.printable import printable
from dynarank.records import EpochRecord, Run, RunRecord, read_runs
from dynarank.report.embed import packaged, policy, script, style
from dynarank.report.formats import joined, number, plural
from dynarank.report.grouping import by_schedule, comparable, run_name
from dynarank.report.markup import Html, element, safe
from dynarank.report.plotting import require_matplotlib
from dynarank.report.sections import sections
from dynarank.report.transition_points import reached_text
from dynarank.report.verdict import verdict

__all__ = ["build_page", "write_report"]

_SCRIPTS = ("page.js", "layer_viewer.js")


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    warn: Callable[[str], None] = warnings.warn,
) -> Path:
    """Write the report of the runs at or below ``folder`` and return its path.

    Runs and parts of runs that cannot be read or drawn are named on the page instead.

    Args:
        folder: a run folder, or a folder of run folders (a comparison).
        output: the file to write; by default ``report.html`` in ``folder``.
        warn: called with what cannot be shown.

    Raises:
        FileNotFoundError: there is no run at or below ``folder``.
        DamagedFileError: none of the runs can be read.
        ImportError: matplotlib is not installed; the message names the extra that brings it.

    """
    require_matplotlib()
    folder = Path(folder)
    runs, unreadable = read_runs(folder)
    page = build_page(runs, unreadable, warn)
    output = folder / "report.html" if output is None else Path(output)
    make_folder(output.parent, output)
    write_text(output, page)
    return output


def build_page(
    runs: Sequence[Run],
    unreadable: Sequence[str] = (),
    warn: Callable[[str], None] = lambda text: None,
) -> str:
    """Build the page as text; the same runs give the same bytes.

    Args:
        runs: the runs to show.
        unreadable: what cannot be read, for the notes at the top.
        warn: called with what cannot be shown.

    Raises:
        ValueError: there is no run, or the runs are judged by different metrics.

    """
    runs = comparable(runs)
    lost = [*unreadable, *(told for run in runs for told in _incomplete(run))]
    for told in lost:
        warn(told)
    recipes = joined(_distinct([run.header.recipe for run in runs]))
    return Template(packaged("page.html")).substitute(
        verdict=_verdict(runs, warn),
        policy=safe(policy(_SCRIPTS)),
        style=style(),
        title=safe(f"{recipes}: training with dynamic rank"),
        date=safe(_date(runs)),
        sentence=safe(_sentence(runs)),
        notes="\n".join(element("p", note, class_="note") for note in [*lost, *_notes(runs)]),
        sections="\n".join(sections(runs, warn)),
        scripts="\n".join(map(script, _SCRIPTS)),
    )


def _verdict(runs: Sequence[Run], warn: Callable[[str], None]) -> Html:
    """What to take from the runs; the page is worth more than this line, should it fail."""
    try:
        return element("p", verdict(runs), class_="verdict")
    except Exception as error:
        warn(f"the first line cannot be written: {type(error).__name__}: {printable(str(error))}")
        return Html("")


def _distinct(items: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _some(items: Sequence[str], most: int = 10) -> list[str]:
    left = len(items) - most
    return [*items[:most], f"{left:,} more"] if left > 1 else list(items)


def _date(runs: Sequence[Run]) -> str:
    """The day the runs started, or the first and last day."""
    days: list[str] = []
    for started in sorted(run.header.started for run in runs):
        try:
            day = datetime.fromisoformat(started)
        except ValueError:
            days.append(started)
        else:
            days.append(f"{day.day} {day:%B %Y}")
    days = _distinct(days)
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _sentence(runs: Sequence[Run]) -> str:
    """Say in one sentence what was run."""
    headers = [run.header for run in runs]
    schedules = list(by_schedule(runs))
    seeds = sorted({header.seed for header in headers if header.seed is not None})
    numbers = joined(_some([str(seed) for seed in seeds]))
    seeded = f"seed{'s' if len(seeds) > 1 else ''} {numbers}, " if seeds else ""
    epochs = _distinct([plural(header.epochs, "epoch") for header in headers])
    devices = _distinct([_device(header) for header in headers])
    precisions = _distinct([header.precision for header in headers])
    recipes = _distinct([header.recipe for header in headers])
    return (
        f"Recipe {joined(recipes)} was trained under {plural(len(schedules), 'schedule')} "
        f"({', '.join(_some(schedules))}), {seeded}for {joined(epochs)} "
        f"on {joined(devices)} "
        f"in {joined(precisions)}: {plural(len(runs), 'run')}."
    )


def _device(header: RunRecord) -> str:
    together = f"{header.processes} processes on " if header.processes > 1 else ""
    return f"{together}{header.device} ({header.hardware})"


def _incomplete(run: Run) -> list[str]:
    """What of a run's files is not shown."""
    where = f"{printable(str(run.folder))}, {run_name(run)}"
    return [f"{where}: {told}." for told in (*run.damage, *run.notes)]


def _notes(runs: Sequence[Run]) -> list[str]:
    """Warnings shown at the top: unfinished and diverged runs."""
    notes: list[str] = []
    unfinished = [run for run in runs if run.summary is None]
    if unfinished:
        told = [f"{run_name(run)} stopped at {reached_text(run)}" for run in unfinished]
        notes.append(
            f"{plural(len(unfinished), 'run')} of {len(runs)} did not finish: {joined(told)}."
        )
    for run in runs:
        losses = [(e.epoch, e.train_loss) for e in run.all(EpochRecord)]
        lost = [epoch for epoch, loss in losses if loss is not None and not math.isfinite(loss)]
        if lost:
            notes.append(
                f"{run_name(run)} diverged: its training loss is not finite at epoch "
                f"{number(lost[0])}. Its loss curve ends there."
            )
    return notes
