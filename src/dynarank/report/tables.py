"""The tables of a report: cost, phases, changes of form, rank metrics by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, stdev

from dynarank.records import (
    ChangeRecord,
    EpochRecord,
    LayerSpectrum,
    Metric,
    PhaseRecord,
    Run,
    SpectrumRecord,
    SummaryRecord,
)
from dynarank.report.colors import schedule_colors
from dynarank.report.formats import (
    bytes_text,
    count,
    error_text,
    flops_text,
    number,
    plural,
    range_text,
    ratio,
    score_text,
    seconds_text,
    spread_text,
)
from dynarank.report.grouping import by_schedule, has_scores, last_losses
from dynarank.report.markup import Html, details, element, table
from dynarank.report.theme import themed_color
from dynarank.report.transition_points import (
    TransitionPoint,
    change_kind,
    last_epoch,
    reached_text,
    transition_points,
)

__all__ = ["all_reduced_bytes", "changes_table", "cost_table", "layers_table", "phases_table"]

MOST_ROWS = 60
_NONE = "–"


def cost_table(runs: Sequence[Run]) -> Html:
    """Build the table of each schedule's score and cost, as means over its finished runs.

    Where no run has a score, its last losses stand in their place.
    """
    metric = runs[0].header.metric
    scored = has_scores(runs)
    results = (f"test {metric.name}", "best") if scored else ("test loss", "training loss")
    columns = (
        "schedule",
        *results,
        "trainable, peak",
        "trainable, mean",
        "training FLOPs",
        "peak memory",
        "training",
        "wall-clock",
    )
    results_of = _scores if scored else _losses
    colors = schedule_colors(by_schedule(runs))
    rows: list[Sequence[str]] = []
    for name, group in by_schedule(runs).items():
        ended = [run for run in group if run.summary is not None]
        swatch = element("span", class_="swatch", style=themed_color(colors[name]))
        if ended:
            counted = f"mean of {len(ended)} runs" if len(ended) > 1 else ""
            rows.append((_named(swatch, name, counted), *results_of(ended), *_cost_cells(ended)))
        for run in group:
            if run.summary is None:
                seed = "" if run.header.seed is None else f"seed {run.header.seed} "
                first = _named(swatch, name, f"{seed}unfinished: {reached_text(run)}")
                rows.append((first, *results_of([run]), *_unfinished_cells(run)))
    return table(columns, rows)


def _named(swatch: Html, name: str, told: str) -> Html:
    small = [element("small", told)] if told else []
    return element("span", swatch, name, *small, class_="wrapped" if len(name) > 40 else "name")


def _scores(runs: Sequence[Run]) -> list[str]:
    """The last and the best score, of the summaries or, of one unfinished run, of its epochs."""
    metric = runs[0].header.metric
    ends = [run.summary for run in runs if run.summary is not None]
    if ends:
        last, best = [end.test_score for end in ends], [end.best_test_score for end in ends]
        return [_mean_and_spread(last, metric), _mean_and_spread(best, metric)]
    scores = [e.test_score for e in runs[0].all(EpochRecord) if e.test_score is not None]
    finite = [score for score in scores if math.isfinite(score)]
    top = (max if metric.higher_is_better else min)(finite, default=math.nan)
    shown = [score_text(score, metric) for score in (*scores[-1:], top)]
    return shown if scores else [_NONE] * 2


def _losses(runs: Sequence[Run]) -> list[str]:
    pairs = zip(*map(last_losses, runs), strict=True)
    return [_mean_and_spread(losses, Metric(name="loss", percent=False)) for losses in pairs]


def _cost_cells(runs: Sequence[Run]) -> Iterator[str]:
    ends = [run.summary for run in runs if run.summary is not None]
    cells: tuple[tuple[Callable[[SummaryRecord], float], Callable[[float], str]], ...] = (
        (lambda end: end.trainable_parameters_peak, count),
        (lambda end: end.trainable_parameters_mean, count),
        (lambda end: end.relative_flops, ratio),
        (lambda end: end.memory_bytes, bytes_text),
        (lambda end: end.train_seconds, seconds_text),
        (lambda end: end.wall_seconds, seconds_text),
    )
    for value, written in cells:
        yield written(fmean(value(end) for end in ends))


def _mean_and_spread(scores: Sequence[float | None], metric: Metric) -> str:
    values = [score for score in scores if score is not None]
    if not values:
        return _NONE
    finite = all(map(math.isfinite, values))
    spread = f" ± {spread_text(stdev(values), metric)}" if len(values) > 1 and finite else ""
    return score_text(fmean(values), metric) + spread


def _unfinished_cells(run: Run) -> Sequence[str]:
    epochs = run.all(EpochRecord)
    if not epochs:
        return [_NONE] * 6
    seconds = seconds_text(math.fsum(epoch.seconds for epoch in epochs))
    peak = count(max(epoch.trainable_parameters for epoch in epochs))
    return (peak, _NONE, _NONE, _NONE, seconds, _NONE)


def phases_table(runs: Sequence[Run]) -> Html:
    """Build the table of what a training step costs in each phase, run by run."""
    columns = (
        "schedule",
        "epochs",
        "forms",
        "trainable",
        "parameters",
        "FLOPs per step, predicted",
        "counted",
        "relative",
        "memory",
    )
    together = any(phase.processes > 1 for run in runs for phase in run.all(PhaseRecord))
    columns = (*columns, "all-reduced") if together else columns
    rows = [row[: len(columns)] for run in runs for row in _phase_rows(run)]
    return Html(table(columns, rows[:MOST_ROWS], text=(0, 1, 2)) + _cut(len(rows), "phase"))


def _phase_rows(run: Run) -> Iterator[Sequence[str]]:
    for phase, end, all_reduced in all_reduced_bytes(run):
        forms = ", ".join(f"{amount:,} {form}" for form, amount in phase.forms.items())
        yield (
            run.header.schedule,
            f"{number(phase.epoch)} to {number(end)}",
            forms,
            count(phase.trainable_parameters),
            count(phase.total_parameters),
            flops_text(phase.predicted_flops),
            _NONE if phase.counted_flops is None else flops_text(phase.counted_flops),
            ratio(phase.relative_flops),
            _NONE if phase.memory_bytes is None else bytes_text(phase.memory_bytes),
            bytes_text(all_reduced) if phase.processes > 1 else _NONE,
        )


def all_reduced_bytes(run: Run) -> Iterator[tuple[PhaseRecord, float, int]]:
    """Each phase, the epoch at which it ends, and what a process gave in it to be averaged."""
    phases = run.all(PhaseRecord)
    ends = [*(phase.epoch for phase in phases[1:]), last_epoch(run)]
    for phase, end in zip(phases, ends, strict=False):
        steps = round((end - phase.epoch) * run.header.steps_per_epoch)
        yield phase, end, steps * phase.all_reduced_bytes_per_step


def changes_table(runs: Sequence[Run]) -> Html:
    """Build the table of transition points: which layers, from what to what, with what error."""
    found = [(run, point) for run in runs for point in transition_points(run)]
    if not found:
        return element("p", "No layer changed form.")
    columns = ("schedule", "time", "kind", "change", "largest weight error")
    rows = [row for run, point in found[:MOST_ROWS] for row in _change_rows(run, point)]
    return Html(table(columns, rows, text=(0, 1, 2, 3)) + _cut(len(found), "transition point"))


def _change_rows(run: Run, point: TransitionPoint) -> Iterator[Sequence[str]]:
    grouped: dict[tuple[str, str, str], list[ChangeRecord]] = {}
    for change in point.changes:
        key = (change_kind(change), _form_text(change.before), _form_text(change.after))
        grouped.setdefault(key, []).append(change)
    at = "start" if point.step == 0 else f"epoch {number(point.epoch)}"
    for (kind, before, after), changes in grouped.items():
        change = f"{before} → {after}" if before != after else f"{before}{_ranks_text(changes)}"
        title = f"{plural(len(changes), 'layer')} {change}"
        paths = [element("li", _path_text(change)) for change in changes]
        listed = details(title, element("ul", *paths, class_="paths"))
        yield run.header.schedule, at, kind, listed, error_text(_largest(changes))


def _form_text(form: dict[str, object]) -> str:
    name, decomposition = form.get("form", "unknown"), form.get("decomposition")
    return f"{name} ({decomposition})" if decomposition else str(name)


def _ranks_text(changes: Sequence[ChangeRecord]) -> str:
    """The ranks of layers that keep their form: ``, rank 9 to 28 → 5 to 22``."""
    sides = ([change.before for change in changes], [change.after for change in changes])
    ranks = [[rank for one in side if isinstance(rank := one.get("rank"), int)] for side in sides]
    told = dict.fromkeys(filter(None, map(range_text, ranks)))
    return f", rank {' → '.join(told)}" if told else ""


def _path_text(change: ChangeRecord) -> str:
    ranks = [f"{form['rank']}" for form in (change.before, change.after) if "rank" in form]
    rank = f", rank {' → '.join(ranks)}" if ranks else ""
    lost = change.update_error or 0
    of_update = f" ({lost:.0%} of the update)" if lost > 0.005 else ""
    return f"{change.path}{rank}, error {error_text(change.error)}{of_update}"


def _largest(changes: Sequence[ChangeRecord]) -> float:
    """The largest error; nan if any is nan (``max`` alone could miss it)."""
    errors = [change.error for change in changes]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _cut(rows: int, noun: str) -> Html:
    left = rows - MOST_ROWS
    return element("p", f"{plural(left, noun)} more in records.jsonl.") if left > 0 else Html("")


def layers_table(runs: Sequence[Run]) -> Html:
    """Build the table of rank metrics by layer at the last reading, schedules side by side."""
    last = [records[-1] for run in runs if (records := run.all(SpectrumRecord))]
    watched = [run for run in runs if run.all(SpectrumRecord)]
    names = dict.fromkeys(name for record in last for name in record.layers)
    columns = ["layer", "full rank", "low rank"]
    for run in watched:
        columns += [f"{run.header.schedule}: {measure}" for measure in ("λ", "effective", "stable")]
    rows = [_layer_row(name, [record.layers.get(name) for record in last]) for name in names]
    return table(columns, rows)


def _layer_row(name: str, layers: Sequence[LayerSpectrum | None]) -> Sequence[str]:
    known = next(layer for layer in layers if layer is not None)
    cells = [name, count(known.full_rank), count(known.rank)]
    for layer in layers:
        if layer is None:
            cells += [_NONE] * 3
        else:
            measures = (layer.spectral_ratio, layer.effective_rank, layer.stable_rank)
            cells += [
                _fixed(value, digits) for value, digits in zip(measures, (3, 1, 1), strict=True)
            ]
    return cells


def _fixed(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else number(value)
