"""The sections of the page, in order; those with nothing to show are left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dynarank.records import (
    DecisionRecord,
    EpochRecord,
    HeatmapRecord,
    NoiseRecord,
    PhaseRecord,
    Run,
    SpectrumRecord,
)
from dynarank.report.bands import bands_figure
from dynarank.report.comparison import compare_scores
from dynarank.report.curves import curves_figure
from dynarank.report.decisions import decisions_table
from dynarank.report.drawing import inline_svg
from dynarank.report.evolution import evolution_figure, spectrum_names
from dynarank.report.figures import MOST_SCHEDULES
from dynarank.report.heatmaps import heatmaps_figure
from dynarank.report.layer_forms import layer_names
from dynarank.report.marks import MOST_LABELS
from dynarank.report.markup import Html, details, element, safe
from dynarank.report.moments import by_schedule, first_of_each
from dynarank.report.moving import moving_block
from dynarank.report.noise import noise_figure
from dynarank.report.planes import planes_figure
from dynarank.report.ranks import MOST_LAYERS, ranks_figure, watched_names
from dynarank.report.tables import changes_table, cost_table, layers_table, phases_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["sections"]


def sections(runs: Sequence[Run]) -> list[Html]:
    """Write the page's sections of runs of one metric."""
    chosen = first_of_each(runs)[:MOST_SCHEDULES]
    which = _which(runs, len(chosen))
    name = runs[0].header.metric.name
    found = [_section(f"{name[:1].upper()}{name[1:]} and cost", cost_table(runs), _planes(runs))]
    if any(run.all(EpochRecord) for run in runs):
        found.append(_section("Learning curves", _curves(runs)))
    found += _rank_sections(chosen, which)
    noisy = [run for run in chosen if run.all(NoiseRecord)]
    if noisy:
        found.append(_section("Gradient noise (experimental)", _noise(noisy, which)))
    if any(run.all(PhaseRecord) for run in chosen):
        found.append(_section("Phases", _said(which), phases_table(chosen)))
    if any(run.all(DecisionRecord) for run in chosen):
        found.append(_section("Decisions and their reasons", _said(which), decisions_table(chosen)))
    found.append(_section("Changes of form", _said(which), changes_table(chosen)))
    found.append(_section("Configuration", _configuration(runs)))
    return found


def _rank_sections(chosen: Sequence[Run], which: str) -> list[Html]:
    found: list[Html] = []
    banded = [run for run in chosen if layer_names(run)]
    if banded:
        found.append(_section("Rank of each layer over time", _bands(banded, which)))
    watched = [run for run in chosen if run.all(SpectrumRecord)]
    if watched:
        by_layer = details("Rank health by layer, at the last reading", layers_table(watched))
        found.append(_section("Rank health over time", _ranks(watched, which), by_layer))
    if any(spectrum_names(run) or run.all(HeatmapRecord) for run in chosen):
        found.append(_section("One layer over time", moving_block(chosen), *_still(chosen)))
    return found


def _section(title: str, *content: str) -> Html:
    return element("section", element("h2", title), *content)


def _said(words: str) -> Html:
    return element("p", words.strip()) if words else Html("")


def _which(runs: Sequence[Run], shown: int) -> str:
    """Say which runs stand for the others where not all are shown."""
    schedules = len(by_schedule(runs))
    said = " The first run of each schedule is shown." if schedules < len(runs) else ""
    return said + (f" {shown} of {schedules} schedules are shown." if shown < schedules else "")


def _planes(runs: Sequence[Run]) -> Html:
    """The planes where there are runs to compare, and what can be told apart."""
    finished = [run for run in runs if run.summary is not None]
    if len(finished) < 2:  # one point is no comparison: the table has said it
        return Html("") if finished else element("p", "No run has finished yet.")
    metric = runs[0].header.metric
    scores = {
        name: [run.summary.test_score for run in group if run.summary is not None]
        for name, group in by_schedule(finished).items()
    }
    told = [element("li", sentence) for sentence in compare_scores(scores, metric)]
    better = "up" if metric.higher_is_better else "down"
    caption = (
        f"Test {metric.name} at the end of training against what it cost: {better} and left is "
        "better."
    )
    if len(scores) < len(finished):
        caption += (
            " Large points are means of a schedule's runs with one standard deviation to each "
            "side, small ones the runs."
        )
    heading = element("h3", "What can be told apart")
    figure = _figure("cost", lambda narrow: planes_figure(runs, 1 if narrow else 3), caption)
    return Html(heading + element("ul", *told, class_="sentences") + figure)


def _curves(runs: Sequence[Run]) -> Html:
    caption = (
        "Solid lines: test. Dotted lines: training. Dashed vertical lines: the moments at which "
        "layers change form, in the color of their schedule (gray where schedules coincide, "
        f"unlabeled or left out where a schedule has more than {MOST_LABELS}). "
        "Shaded, or as strips below: the share of the layers that are full-rank."
    )
    if len(by_schedule(runs)) < len(runs):
        caption += " Thick lines are means of a schedule's runs, thin ones the runs."
    return _figure("curves", lambda narrow: curves_figure(runs, 1 if narrow else 2), caption)


def _ranks(runs: Sequence[Run], which: str) -> Html:
    caption = (
        "The spectral ratio λ at each layer's low rank (near 1, the weight is nearly low-rank), "
        "and the effective rank as a share of the layer's full rank." + which
    )
    if (layers := len(watched_names(runs))) > MOST_LAYERS:
        caption += f" {MOST_LAYERS} of {layers} layers are drawn; the median is of all."
    return _figure("ranks", lambda narrow: ranks_figure(runs, narrow), caption)


def _noise(runs: Sequence[Run], which: str) -> Html:
    caption = (
        "The batch size at which the gradient's noise is as large as the gradient: tr(covariance) "
        "of one sample's gradient over the squared norm of their mean. Well below it a larger "
        "batch helps, well above it hardly." + which
    )
    return _figure("noise", lambda narrow: noise_figure(runs, narrow), caption)


def _bands(runs: Sequence[Run], which: str) -> Html:
    caption = (
        "A band a layer, from the first (above) to the last. The color is the form; the deeper, "
        "the larger the rank as a share of the layer's full rank." + which
    )
    return _figure("bands", lambda narrow: bands_figure(runs, narrow), caption)


def _still(chosen: Sequence[Run]) -> list[Html]:
    """Pictures of the first run that has some, for paper and for readers without scripts."""
    found: list[Html] = []
    spectra = next((run for run in chosen if spectrum_names(run)), None)
    weights = next((run for run in chosen if run.all(HeatmapRecord)), None)
    if spectra is not None:
        caption = "Singular values over the largest, at several moments."
        found.append(_figure("spectra", lambda _: evolution_figure(spectra), caption, once=True))
    if weights is not None:
        caption = "Weights as pictures: mean absolute values of blocks, each layer on one scale."
        found.append(_figure("weights", lambda _: heatmaps_figure(weights), caption, once=True))
    return [element("div", *found, class_="static")] if found else []


def _figure(name: str, draw: Callable[[bool], Figure], caption: str, once: bool = False) -> Html:
    """A figure for wide screens and the same for narrow ones; the style sheet shows one of them."""
    cards = [_card(name, draw(False), caption, "card" if once else "card wide-figure")]
    if not once:
        cards.append(_card(f"{name}-narrow", draw(True), caption, "card narrow"))
    return element("figure", *cards, element("figcaption", caption))


def _card(name: str, figure: Figure, caption: str, kind: str) -> Html:
    svg = inline_svg(figure, name)
    label = f'<svg role="img" aria-label="{safe(caption)}"'
    return element("div", Html(svg.replace("<svg", label, 1)), class_=kind)


def _configuration(runs: Sequence[Run]) -> Html:
    """Show everything recorded about how the runs were made."""
    blocks: list[Html] = []
    for run in runs:
        recorded = {"run": run.header.model_dump(mode="json"), "config": run.config}
        text = json.dumps(recorded, indent=2, ensure_ascii=False)
        blocks.append(element("h3", f"{run.header.schedule}, seed {run.header.seed}"))
        blocks.append(element("pre", text))
    return details("Configuration and versions, as recorded", *blocks)
