"""One self-contained HTML page from run records: no network, no script, figures inline."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from dynarank.records import EpochRecord, PhaseRecord, Run, SpectrumRecord, find_runs, read_run
from dynarank.report import plots
from dynarank.report.drawing import inline_svg, require_matplotlib
from dynarank.report.formats import joined, number, plural
from dynarank.report.marks import MOST_LABELS
from dynarank.report.markup import Html, details, element, safe
from dynarank.report.moments import by_schedule, first_of_each, last_epoch
from dynarank.report.tables import changes_table, cost_table, layers_table, phases_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["build_page", "write_report"]


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of the runs at or below ``folder``; returns where it is.

    Args:
        folder: a run folder, or a folder of them: a comparison.
        output: the file to write; ``report.html`` in ``folder`` when left out.

    Raises:
        FileNotFoundError: there is no run at or below ``folder``.
        ImportError: matplotlib is not installed; the message names the extra that brings it.

    """
    require_matplotlib()
    page = build_page([read_run(path) for path in find_runs(folder)])
    output = folder / "report.html" if output is None else output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8", newline="\n")
    return output


def build_page(runs: Sequence[Run]) -> str:
    """Build the page as text: the same runs give the same bytes.

    Raises:
        ValueError: there is no run.

    """
    if not runs:
        raise ValueError("a report needs at least one run, got none")
    template = Template(files("dynarank.report").joinpath("page.html").read_text(encoding="utf-8"))
    recipes = joined(_distinct([run.header.recipe for run in runs]))
    return template.substitute(
        title=safe(f"{recipes}: training with dynamic rank"),
        date=safe(_date(runs)),
        sentence=safe(_sentence(runs)),
        notes="\n".join(element("p", note, class_="note") for note in _notes(runs)),
        sections="\n".join(_sections(runs)),
    )


def _distinct(items: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _date(runs: Sequence[Run]) -> str:
    """Say when the runs started: a day, or the first and the last."""
    days: list[str] = []
    for started in sorted(run.header.started for run in runs):
        try:
            moment = datetime.fromisoformat(started)
        except ValueError:
            days.append(started)
        else:
            days.append(f"{moment.day} {moment:%B %Y}")
    days = _distinct(days)
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _sentence(runs: Sequence[Run]) -> str:
    """Say in one sentence what was run."""
    headers = [run.header for run in runs]
    schedules = list(by_schedule(runs))
    seeds = sorted({header.seed for header in headers})
    epochs = _distinct([plural(header.epochs, "epoch") for header in headers])
    devices = _distinct([f"{header.device} ({header.hardware})" for header in headers])
    precisions = _distinct([header.precision for header in headers])
    recipes = _distinct([header.recipe for header in headers])
    return (
        f"Recipe {joined(recipes)} was trained under {plural(len(schedules), 'schedule')} "
        f"({', '.join(schedules)}), seed{'s' if len(seeds) > 1 else ''} "
        f"{joined([str(seed) for seed in seeds])}, for {joined(epochs)} on {joined(devices)} "
        f"in {joined(precisions)}: {plural(len(runs), 'run')}."
    )


def _notes(runs: Sequence[Run]) -> list[str]:
    """Say what a reader must know first: unfinished or diverged runs, too few seeds."""
    notes: list[str] = []
    unfinished = [run for run in runs if run.summary is None]
    if unfinished:
        told = [
            f"{run.header.schedule} (seed {run.header.seed}) stopped at epoch "
            f"{number(last_epoch(run))} of {run.header.epochs}"
            for run in unfinished
        ]
        notes.append(
            f"{plural(len(unfinished), 'run')} of {len(runs)} did not finish: {joined(told)}."
        )
    for run in runs:
        lost = [e.epoch for e in run.all(EpochRecord) if not math.isfinite(e.train_loss)]
        if lost:
            notes.append(
                f"{run.header.schedule} (seed {run.header.seed}) diverged: its training loss is "
                f"not finite at epoch {number(lost[0])}. Its loss curve ends there."
            )
    if min(len(group) for group in by_schedule(runs).values()) == 1:
        notes.append(
            "One run per schedule cannot distinguish small differences in accuracy: "
            "another seed may move a result by as much."
        )
    return notes


def _sections(runs: Sequence[Run]) -> list[Html]:
    """Write the page's sections, in order; those with nothing to show are left out."""
    chosen = first_of_each(runs)
    watched = [run for run in chosen if run.all(SpectrumRecord)]
    which = " The first run of each schedule is shown." if len(chosen) < len(runs) else ""
    sections = [_section("Accuracy and cost", cost_table(runs), _cost_figure(runs))]
    if any(run.all(EpochRecord) for run in runs):
        sections.append(_section("Learning curves", _curves_figure(runs)))
    if watched:
        by_layer = details("Rank health by layer, at the last reading", layers_table(watched))
        sections.append(_section("Rank over time", _ranks_figure(watched, which), by_layer))
    if any(run.all(PhaseRecord) for run in chosen):
        sections.append(_section("Phases", _said(which), phases_table(chosen)))
    sections.append(_section("Changes of form", _said(which), changes_table(chosen)))
    sections.append(_section("Configuration", _configuration(runs)))
    return sections


def _section(title: str, *content: str) -> Html:
    return element("section", element("h2", title), *content)


def _said(words: str) -> Html:
    return element("p", words.strip()) if words else Html("")


def _cost_figure(runs: Sequence[Run]) -> Html:
    finished = sum(run.summary is not None for run in runs)
    if finished < 2:  # one point is no comparison: the table has said it
        return Html("") if finished else element("p", "No run has finished yet.")
    caption = "Test accuracy at the end of training against what it cost: up and left is better."
    if len(by_schedule(runs)) < len(runs):
        caption += " Large points are means of a schedule's runs, small ones the runs."
    return _figure("cost", plots.cost_figure(runs), caption)


def _curves_figure(runs: Sequence[Run]) -> Html:
    caption = (
        "Solid lines: test. Dotted lines: training. Dashed vertical lines: the moments at which "
        "layers change form, in the colour of their schedule (grey where schedules coincide, "
        f"unlabelled where a schedule has more than {MOST_LABELS})."
    )
    return _figure("curves", plots.curves_figure(runs), caption)


def _ranks_figure(runs: Sequence[Run], which: str) -> Html:
    caption = (
        "Above, the spectral ratio λ at each layer's low rank: near 1, the weight is nearly "
        "low-rank. Below, the effective rank as a share of the layer's full rank." + which
    )
    return _figure("ranks", plots.ranks_figure(runs), caption)


def _figure(name: str, figure: Figure, caption: str) -> Html:
    """Put a figure on a card of its own, which scrolls where the screen is narrow."""
    svg = inline_svg(figure, name)
    width = f"min-width:{86 * figure.get_figwidth():.0f}px"
    label = f'<svg role="img" aria-label="{safe(caption)}" style="{width}"'
    card = element("div", Html(svg.replace("<svg", label, 1)), class_="card", tabindex="0")
    return element("figure", card, element("figcaption", caption))


def _configuration(runs: Sequence[Run]) -> Html:
    """Show everything recorded about how the runs were made."""
    blocks: list[Html] = []
    for run in runs:
        recorded = {"run": run.header.model_dump(mode="json"), "config": run.config}
        text = json.dumps(recorded, indent=2, ensure_ascii=False)
        blocks.append(element("h3", f"{run.header.schedule}, seed {run.header.seed}"))
        blocks.append(element("pre", text))
    return details("Configuration and versions, as recorded", *blocks)
