"""What the page's moving pictures show: spectra and weights of each layer over time, as JSON.

Numbers are packed: a singular value is two letters on a logarithmic scale from ``s_max`` down to
``s_max * 1e-5`` over all the layer's moments; a block of weights one letter from 0 to the layer's
largest. Both are within what a screen can show, and thinned to a budget that bounds the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dynarank.records import HeatmapRecord, LayerSpectrum, Run, SpectrumRecord
from dynarank.report.formats import joined
from dynarank.report.heatmaps import picture_names
from dynarank.report.layer_forms import FormSpan, layer_forms
from dynarank.report.moments import last_epoch
from dynarank.report.ranks import watched_names
from dynarank.report.thinning import evenly, kept_text, within

__all__ = ["DECADES", "LETTERS", "limits_text", "moving_pictures", "pack_spectrum", "pack_weights"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
DECADES = 5
SPECTRUM_BUDGET = 320_000  # singular values on a page: two bytes each
PICTURE_BUDGET = 400_000  # blocks of weights on a page: one byte each
_MOST_MOMENTS = 60


def moving_pictures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Pack the runs that have spectra or pictures of weights; the budget is shared between them."""
    shown = [run for run in runs if run.all(SpectrumRecord) or run.all(HeatmapRecord)]
    return [_packed(run, len(shown)) for run in shown]


def limits_text(pictures: Sequence[dict[str, Any]]) -> str:
    """Say what was left out to keep the page small; nothing where all is there."""
    told = dict.fromkeys(text for run in pictures for text in run["limits"] if text)
    return f"Kept in this page: {joined(list(told))}; records.jsonl has all." if told else ""


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
    layers, moments = within(SPECTRUM_BUDGET // runs, len(names), len(spectra), 64)
    kept_names, kept_spectra = evenly(names, layers), evenly(spectra, min(moments, _MOST_MOMENTS))
    forms = layer_forms(run)
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


def _span(span: FormSpan) -> list[Any]:
    return [span.start, span.end, span.form, span.rank]


def _spectra(layers: Sequence[LayerSpectrum | None]) -> dict[str, Any]:
    """A layer's measures and singular values at each moment; None where one was not read."""
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
    """Pictures of weights within the budget: coarser blocks first, then fewer moments, layers."""
    names, budget = picture_names(run), PICTURE_BUDGET // runs
    side = next((s for s in (32, 16) if len(names) * min(len(records), 8) * s * s <= budget), 8)
    layers, moments = within(budget, len(names), len(records), side * side)
    kept, shown = evenly(names, layers), evenly(records, min(moments, _MOST_MOMENTS))
    return {
        "epochs": [record.epoch for record in shown],
        "layers": {name: _picture([r.layers.get(name) for r in shown], side) for name in kept},
        "limits": [
            kept_text(len(shown), len(records), "moment") and
            f"{kept_text(len(shown), len(records), 'moment')} of the weights",
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
    """Means of blocks of a picture's cells, at most ``side`` each way."""
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
