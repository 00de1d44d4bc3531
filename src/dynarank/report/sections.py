"""The sections of the report page, in order; empty ones are left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dynarank.files.printable import printable
from dynarank.records import (
    DecisionRecord,
    HeatmapRecord,
    NoiseRecord,
    PhaseRecord,
    Run,
    SpectrumRecord,
)
from dynarank.report.annotations import MOST_LABELS
from dynarank.report.colors import schedule_colors
from dynarank.report.comparison import compare_scores
from dynarank.report.cost_quality import cost_quality_figure
from dynarank.report.curves import curves_figure, has_curves
from dynarank.report.decisions import decisions_table
from dynarank.report.figures import MOST_SCHEDULES
from dynarank.report.formats import joined, plural
from dynarank.report.grouping import (
    by_schedule,
    final_scores,
    first_of_each,
    has_scores,
    run_name,
)
from dynarank.report.heatmaps import heatmaps_figure
from dynarank.report.layer_forms import layer_names
from dynarank.report.layer_viewer import layer_viewer
from dynarank.report.markup import Html, details, element, safe
from dynarank.report.noise import noise_figure
from dynarank.report.plotting import inline_svg
from dynarank.report.rank_metrics import MOST_LAYERS, rank_metrics_figure, watched_names
from dynarank.report.rank_timeline import rank_timeline_figure
from dynarank.report.spectra_over_time import spectra_over_time_figure, spectrum_names
from dynarank.report.tables import changes_table, cost_table, layers_table, phases_table
from dynarank.report.terms import terms
from dynarank.report.transition_points import transition_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["sections"]


# The sections that use the words for forms and changes, in order.
_IN_TERMS = ("Learning curves", "Rank of each layer over time", "Phases", "Changes of form")
_MOST_SENTENCES = 8  # of the statistical comparison, beyond which they are folded
_Build = Callable[[Sequence[Run]], Iterable[Html]]


def sections(runs: Sequence[Run], warn: Callable[[str], None] = lambda text: None) -> list[Html]:
    """Write the page's sections of runs of one metric.

    Args:
        runs: the runs.
        warn: called with what cannot be shown; the page says it too.
    """
    chosen = first_of_each(runs)[:MOST_SCHEDULES]
    which = _which(runs, len(chosen))
    colors = schedule_colors(by_schedule(runs))
    name = runs[0].header.metric.name if has_scores(runs) else "loss"
    parts: list[tuple[str, Sequence[Run], _Build]] = [
        (f"{name[:1].upper()}{name[1:]} and cost", runs, _costs),
        ("Learning curves", runs, _curves),
        ("Rank of each layer over time", chosen, lambda runs: _timeline(runs, which)),
        ("Rank metrics over time", chosen, lambda runs: _rank_metrics(runs, which)),
        ("One layer over time", chosen, _one_layer),
        ("Gradient noise (experimental)", chosen, lambda runs: _noise(runs, which, colors)),
        ("Phases", chosen, lambda runs: _table(runs, PhaseRecord, which, phases_table)),
        (
            "Decisions and reasons",
            chosen,
            lambda runs: _table(runs, DecisionRecord, which, decisions_table),
        ),
        ("Changes of form", chosen, lambda runs: [_said(which), changes_table(runs)]),
        ("Configuration", runs, lambda runs: [_configuration(runs)]),
    ]
    built = {title: _content(title, shown, build, warn) for title, shown, build in parts}
    first = next(title for title in _IN_TERMS if built[title])
    built[first].insert(0, terms(runs))  # explained where they first occur
    return [
        element("section", element("h2", title), *found) for title, found in built.items() if found
    ]


def _content(
    title: str, runs: Sequence[Run], build: _Build, warn: Callable[[str], None]
) -> list[Html]:
    """Build a section, without the runs for which that fails: they are named instead."""
    content = _built(build, runs)
    if not isinstance(content, str):
        return content
    able = [run for run in runs if not isinstance(_built(build, [run]), str)]
    rest = _built(build, able) if 0 < len(able) < len(runs) else ""
    lost = [run for run in runs if isinstance(rest, str) or run not in able]
    names = joined([run_name(run) for run in lost])
    told = f"{title} cannot be shown for {printable(names)}: {content}"
    warn(told)
    return [element("p", f"{told}.", class_="note"), *([] if isinstance(rest, str) else rest)]


def _built(build: _Build, runs: Sequence[Run]) -> list[Html] | str:
    """The content of a section, or why it cannot be built: no section is worth the page."""
    try:
        return list(build(runs))
    except Exception as error:
        return printable(f"{type(error).__name__}: {error}")


def _costs(runs: Sequence[Run]) -> list[Html]:
    return [cost_table(runs), _quality(runs)]


def _one_layer(runs: Sequence[Run]) -> list[Html]:
    if not any(spectrum_names(run) or run.all(HeatmapRecord) for run in runs):
        return []
    return [layer_viewer(runs), *_static(runs)]


def _table(
    runs: Sequence[Run],
    kind: type[PhaseRecord] | type[DecisionRecord],
    which: str,
    build: Callable[[Sequence[Run]], Html],
) -> list[Html]:
    return [_said(which), build(runs)] if any(run.all(kind) for run in runs) else []


def _said(words: str) -> Html:
    return element("p", words.strip()) if words else Html("")


def _which(runs: Sequence[Run], shown: int) -> str:
    """Say which runs are shown, if not all are."""
    schedules = len(by_schedule(runs))
    said = " The first run of each schedule is shown." if schedules < len(runs) else ""
    return said + (f" {shown} of {schedules} schedules are shown." if shown < schedules else "")


def _quality(runs: Sequence[Run]) -> Html:
    """The cost-quality plots and significant differences, if there are runs to compare."""
    finished = [run for run in runs if final_scores([run])]
    if len(finished) < 2:  # one point is no comparison, and the table has it already
        ended = any(run.summary is not None for run in runs)
        return Html("") if ended else element("p", "No run has finished yet.")
    metric = runs[0].header.metric
    scores = {name: final_scores(group) for name, group in by_schedule(finished).items()}
    told = [element("li", sentence) for sentence in compare_scores(scores, metric)]
    better = "up" if metric.higher_is_better else "down"
    caption = (
        f"Test {metric.name} at the end of training against the cost of training: {better} and "
        "left is better."
    )
    if len(scores) < len(finished):
        caption += (
            " Large points are means over a schedule's runs, with error bars of one standard "
            "deviation; small points are the runs."
        )
    heading = element("h3", "Statistical comparison")
    figure = _figure("cost", lambda narrow: cost_quality_figure(runs, 1 if narrow else 3), caption)
    listed = element("ul", *told, class_="sentences")
    if len(told) > _MOST_SENTENCES:
        listed = details(f"Each with each: {plural(len(scores), 'schedule')}", listed)
    return Html(heading + listed + figure)


def _curves(runs: Sequence[Run]) -> list[Html]:
    if not has_curves(runs):
        return []
    caption = (
        "Solid lines: test. Dotted lines: training. Dashed vertical lines: transition points, at "
        "which layers change form, in the color of their schedule (gray where schedules coincide; "
        f"unlabeled or left out if a schedule has more than {MOST_LABELS}). "
        "Shading, or the strips below: the share of scheduled layers at full rank."
    )
    if len(by_schedule(runs)) < len(runs):
        caption += " Thick lines are means over a schedule's runs, thin lines the runs."
    return [_figure("curves", lambda narrow: curves_figure(runs, 1 if narrow else 2), caption)]


def _rank_metrics(runs: Sequence[Run], which: str) -> list[Html]:
    watched = [run for run in runs if run.all(SpectrumRecord)]
    if not watched:
        return []
    caption = (
        "The spectral ratio λ at each layer's low rank (near 1: the weight is nearly low-rank), "
        "and the effective rank as a share of the layer's full rank." + which
    )
    if (layers := len(watched_names(watched))) > MOST_LAYERS:
        caption += f" {MOST_LAYERS} of {layers} layers are drawn; the median is over all."
    figure = _figure("rank-metrics", lambda narrow: rank_metrics_figure(watched, narrow), caption)
    return [
        figure,
        details("Rank metrics by layer, at the last reading", layers_table(watched)),
    ]


def _noise(runs: Sequence[Run], which: str, colors: Mapping[str, str]) -> list[Html]:
    noisy = [run for run in runs if run.all(NoiseRecord)]
    if not noisy:
        return []
    caption = (
        "The batch size at which gradient noise is as large as the gradient: the trace of the "
        "covariance of per-sample gradients over the squared norm of their mean. Well below it a "
        "larger batch helps; well above it, hardly." + which
    )
    return [_figure("noise", lambda narrow: noise_figure(noisy, narrow, colors), caption)]


def _timeline(runs: Sequence[Run], which: str) -> list[Html]:
    timed = [run for run in runs if layer_names(run)]
    if not timed:
        return []
    caption = (
        "One bar per layer, the first layer at the top. The gray is the form, hatched where "
        "adapted; the stronger it is, the larger the rank as a share of the layer's full rank."
        + which
    )
    figure = _figure("rank-timeline", lambda narrow: rank_timeline_figure(timed, narrow), caption)
    return [figure]


def _static(chosen: Sequence[Run]) -> list[Html]:
    """Static figures of a run that has data, for printing and without scripts; one that changes."""
    chosen = sorted(chosen, key=lambda run: not transition_points(run))
    found: list[Html] = []
    spectra = next((run for run in chosen if spectrum_names(run)), None)
    weights = next((run for run in chosen if run.all(HeatmapRecord)), None)
    if spectra is not None:
        caption = "Singular values, divided by the largest, at several epochs."
        found.append(
            _figure("spectra", lambda _: spectra_over_time_figure(spectra), caption, once=True)
        )
    if weights is not None:
        caption = "Heat-maps of weights: mean absolute values of blocks, one scale per layer."
        found.append(_figure("weights", lambda _: heatmaps_figure(weights), caption, once=True))
    return [element("div", *found, class_="static")] if found else []


def _figure(name: str, draw: Callable[[bool], Figure], caption: str, once: bool = False) -> Html:
    """A figure for wide screens and one for narrow screens; the style sheet shows one of them."""
    frames = [_frame(name, draw(False), caption, "frame" if once else "frame wide-figure")]
    if not once:
        frames.append(_frame(f"{name}-narrow", draw(True), caption, "frame narrow"))
    return element("figure", *frames, element("figcaption", caption))


def _frame(name: str, figure: Figure, caption: str, kind: str) -> Html:
    svg = inline_svg(figure, name)
    label = f'<svg role="img" aria-label="{safe(caption)}"'
    return element("div", Html(svg.replace("<svg", label, 1)), class_=kind)


def _configuration(runs: Sequence[Run]) -> Html:
    """Everything recorded about the configuration of the runs."""
    blocks: list[Html] = []
    for run in runs:
        recorded = {"run": run.header.model_dump(mode="json"), "config": run.config}
        text = json.dumps(recorded, indent=2, ensure_ascii=False)
        blocks.append(element("h3", run_name(run)))
        blocks.append(element("pre", text))
    return details("Configuration and versions, as recorded", *blocks)
