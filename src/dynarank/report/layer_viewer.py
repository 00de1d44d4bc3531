"""The layer viewer: one layer at the epoch a slider is set to; ``layer_viewer.js`` draws it."""

from __future__ import annotations

from collections.abc import Sequence

from dynarank.records import Run
from dynarank.report.colors import FORM_COLORS, FORM_HATCHES
from dynarank.report.embed import data_block
from dynarank.report.layer_viewer_data import DECADES, LETTERS, limits_text, opening, viewer_runs
from dynarank.report.markup import Html, element
from dynarank.report.theme import variable

__all__ = ["layer_viewer"]

_CAPTION = (
    "Left: the layer's singular values, divided by the largest it ever had; gray: at the first "
    "reading. Right: its weights as mean absolute values of blocks, outputs down, inputs across. "
    "Below: its effective rank as a share of full rank (solid), λ (dashed) and its form over time."
)


def layer_viewer(runs: Sequence[Run]) -> Html:
    """Build the viewer's controls, frames and data; hidden until the script starts.

    Empty if no run has spectra or heat-maps.
    """
    pictures = viewer_runs(runs)
    if not pictures:
        return Html("")
    data = {
        "letters": LETTERS,
        "decades": DECADES,
        "colors": _viridis(),
        "forms": {form: variable(light) for form, (light, _) in FORM_COLORS.items()},
        "hatched": list(FORM_HATCHES),
        "opening": opening(pictures),
        "runs": pictures,
    }
    caption = f"{_CAPTION} {limits_text(pictures)}".strip()
    frames = element("div", _spectrum(), _weights(), class_="moving")
    timeline = _svg("timeline", "0 0 890 132", "The layer's ranks and form over time")
    readout = element("p", id="moving-readout", class_="readout", aria_live="off")
    frame = element("div", frames, timeline, class_="frame")
    body = element("figure", _controls(), readout, frame, element("figcaption", caption))
    return Html(element("div", body, id="moving", hidden="") + data_block("pictures", data))


def _controls() -> Html:
    run = element("select", id="moving-run")
    layer = element("select", id="moving-layer")
    slider = Html('<input type="range" id="moving-time" min="0" max="0" step="1" value="0">')
    return element(
        "div",
        element("label", "Schedule", run, id="moving-run-label"),
        element("label", "Layer", layer),
        element("label", "Time", slider, class_="time"),
        element("button", "Play", id="moving-play", type="button"),
        class_="controls",
    )


def _spectrum() -> Html:
    picture = _svg("spectrum", "0 0 480 290", "Singular values of the chosen layer")
    return element("div", element("h3", "Singular values"), picture)


def _weights() -> Html:
    canvas = element(
        "canvas", id="moving-weights", role="img", aria_label="Weights of the chosen layer"
    )
    note = element("p", id="moving-weights-note", class_="date")
    return element("div", element("h3", "Weights"), canvas, note)


def _svg(name: str, box: str, label: str) -> Html:
    return Html(f'<svg id="moving-{name}" viewBox="{box}" role="img" aria-label="{label}"></svg>')


def _viridis() -> list[list[int]]:
    """Viridis, with one color for each value of a packed block."""
    from matplotlib import colormaps

    scale, last = colormaps["viridis"], len(LETTERS) - 1
    return [[round(255 * part) for part in scale(i / last)[:3]] for i in range(len(LETTERS))]
