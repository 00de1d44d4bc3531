"""The layer viewer's data: spectra and weights of each layer over time, packed as JSON.

A singular value takes two letters, on a logarithmic scale from ``s_max`` down to ``s_max * 1e-5``
over all the layer's readings; a block of weights takes one letter, from 0 to the layer's largest.
That is as precise as a screen can show. Readings and layers are thinned to bound the page's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dynarank.records import HeatmapRecord, LayerSpectrum, Run, SpectrumRecord
from dynarank.report.formats import joined
from dynarank.report.heatmaps import heatmap_names
from dynarank.report.layer_forms import FormSpan, layer_forms
from dynarank.report.rank_metrics import watched_names
from dynarank.report.thinning import evenly, kept_text, within
from dynarank.report.transition_points import last_epoch

__all__ = [
    "DECADES",
    "LETTERS",
    "limits_text",
    "opening",
    "pack_spectrum",
    "pack_weights",
    "viewer_runs",
]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
DECADES = 5
SPECTRUM_BUDGET = 320_000  # singular values on a page: two bytes each
HEATMAP_BUDGET = 400_000  # blocks of weights on a page: one byte each
_MOST_READINGS = 60


def viewer_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Pack the runs that have spectra or heat-maps; they share the size budget."""
    shown = [run for run in runs if run.all(SpectrumRecord) or run.all(HeatmapRecord)]
    return [_packed(run, len(shown)) for run in shown]


def opening(pictures: Sequence[dict[str, Any]]) -> int:
    """The run that the viewer opens on: the first in which a layer changes form."""
    changing = (any(len(layer["forms"]) > 1 for layer in run["layers"]) for run in pictures)
    return next((index for index, changes in enumerate(changing) if changes), 0)


def limits_text(pictures: Sequence[dict[str, Any]]) -> str:
    """Say what was left out to keep the page small; empty if nothing was."""
    told = dict.fromkeys(text for run in pictures for text in run["limits"] if text)
    return f"This page shows {joined(list(told))}; records.jsonl has all." if told else ""


def pack_spectrum(values: Sequence[float], top: float) -> str:
    """Two letters a value: ``4095 * (1 + log10(value / top) / 5)``, cut at 0 and 4095.

    Example:
        >>> pack_spectrum([1.0, 0.0], 1.0)
        '__AA'
    """
    return "".join(_two_letters(value / top) for value in values)


def pack_weights(rows: Sequence[Sequence[float]], top: float) -> str:
    """One letter a block, ``63 * value / top``, row by row; a dot where it is not finite.

    Example:
        >>> pack_weights([[0.0, 1.0], [float("nan"), 0.5]], 1.0)
        'A_.g'
    """
    return "".join(
        LETTERS[min(round(63 * abs(value) / top), 63)] if math.isfinite(value) else "."
        for row in rows
        for value in row
    )


def _two_letters(share: float) -> str:
    scaled = 1 + math.log10(share) / DECADES if share > 0 else 0
    high, low = divmod(min(max(round(4095 * scaled), 0), 4095), 64)
    return LETTERS[high] + LETTERS[low]


def _packed(run: Run, runs: int) -> dict[str, Any]:
    spectra, pictures = run.all(SpectrumRecord), run.all(HeatmapRecord)
    names = watched_names([run])
    layers, readings = within(SPECTRUM_BUDGET // runs, len(names), len(spectra), 64)
    forms = layer_forms(run)
    kept_names = _kept(names, layers, [name for name in names if len(forms[name]) > 1])
    kept_spectra = evenly(spectra, min(readings, _MOST_READINGS))
    weights = _weights(run, pictures, runs)
    return {
        "name": run.header.schedule,
        "end": last_epoch(run),
        "epochs": [record.epoch for record in kept_spectra],
        "pictureEpochs": weights["epochs"],
        "layers": [
            {
                "name": name,
                **_spectra([record.layers.get(name) for record in kept_spectra]),
                "forms": [_span(span) for span in forms.get(name, [])],
                **({"picture": weights["layers"][name]} if name in weights["layers"] else {}),
            }
            for name in dict.fromkeys([*kept_names, *weights["layers"]])
        ],
        "limits": [
            kept_text(len(kept_spectra), len(spectra), "reading"),
            kept_text(len(kept_names), len(names), "layer"),
            *weights["limits"],
        ],
    }


def _kept(names: Sequence[str], most: int, changing: Sequence[str]) -> list[str]:
    """Evenly spaced layers, among them one that changes form, if any does."""
    kept = evenly(names, most)
    if changing and not set(kept) & set(changing):
        kept[len(kept) // 2] = changing[0]
    return [name for name in names if name in set(kept)]


def _span(span: FormSpan) -> list[Any]:
    return [span.start, span.end, span.form, span.rank]


def _spectra(layers: Sequence[LayerSpectrum | None]) -> dict[str, Any]:
    """A layer's metrics and singular values at each reading; None where it was not read."""
    known = [layer for layer in layers if layer is not None]
    top = max((v for layer in known for v in layer.values if math.isfinite(v)), default=0)
    return {
        "full": known[0].full_rank if known else None,
        "rank": known[0].rank if known else None,
        "measures": [None if layer is None else _measures(layer) for layer in layers],
        "spectra": [
            pack_spectrum(layer.values, top)
            if layer is not None and layer.values and top > 0
            and all(map(math.isfinite, layer.values))
            else None
            for layer in layers
        ],
    }  # fmt: skip


def _measures(layer: LayerSpectrum) -> list[float | None]:
    values = (layer.effective_rank, layer.stable_rank, layer.spectral_ratio, layer.update_rank)
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
        for value in values
    ]


def _weights(run: Run, records: Sequence[HeatmapRecord], runs: int) -> dict[str, Any]:
    """Heat-maps within the budget: first coarser blocks, then fewer readings and layers."""
    names, budget = heatmap_names(run), HEATMAP_BUDGET // runs
    side = next((s for s in (32, 16) if len(names) * min(len(records), 8) * s * s <= budget), 8)
    layers, readings = within(budget, len(names), len(records), side * side)
    kept, shown = evenly(names, layers), evenly(records, min(readings, _MOST_READINGS))
    return {
        "epochs": [record.epoch for record in shown],
        "layers": {name: _picture([r.layers.get(name) for r in shown], side) for name in kept},
        "limits": [
            kept_text(len(shown), len(records), "reading") and
            f"{kept_text(len(shown), len(records), 'reading')} of the weights",
            kept_text(len(kept), len(names), "layer") and
            f"weights of {kept_text(len(kept), len(names), 'layer')}",
            f"weights in {side} x {side} blocks" if names and side < 32 else "",
        ],
    }  # fmt: skip


def _picture(pictures: Sequence[Sequence[Sequence[float]] | None], side: int) -> dict[str, Any]:
    pooled = [None if picture is None else _pooled(picture, side) for picture in pictures]
    finite = [v for p in pooled if p for row in p for v in row if math.isfinite(v)]
    top = max(map(abs, finite), default=0) or 1.0
    first = next((picture for picture in pooled if picture), [[]])
    return {
        "rows": len(first),
        "columns": len(first[0]),
        "top": float(f"{top:.4g}"),
        "cells": [None if picture is None else pack_weights(picture, top) for picture in pooled],
    }


def _pooled(picture: Sequence[Sequence[float]], side: int) -> list[list[float]]:
    """Average-pool a heat-map to at most ``side`` cells in each direction."""
    down, across = (-(-max(size, 1) // side) for size in (len(picture), len(picture[0])))
    return [
        [
            _mean([v for row in picture[i : i + down] for v in row[j : j + across]])
            for j in range(0, len(picture[0]), across)
        ]
        for i in range(0, len(picture), down)
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
