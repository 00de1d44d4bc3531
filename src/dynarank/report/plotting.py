"""matplotlib helpers: lazy import, the report's style without global state, colors, SVG export."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import wraps
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from dynarank.files.atomic import replacing
from dynarank.records import Metric
from dynarank.report.theme import INK, NEUTRAL, depth_hexes, themed
from dynarank.sinks.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "INK",
    "NEUTRAL",
    "depth_colormap",
    "depth_colors",
    "display_name",
    "display_names",
    "inline_svg",
    "new_figure",
    "percent_tick",
    "plain_tick",
    "point_markers",
    "require_matplotlib",
    "save_figure",
    "score_axis",
    "styled",
]

_STYLE: dict[str, object] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.solid_capstyle": "round",
    # A fixed salt gives clip paths the same names in every save; text stays text, so searchable.
    "svg.hashsalt": "dynarank",
    "svg.fonttype": "none",
}
_P = ParamSpec("_P")


def require_matplotlib() -> None:
    """Import matplotlib, before anything is computed for a figure.

    Raises:
        ImportError: it is not installed.

    """
    import_extra("matplotlib.figure", "report", "a figure")


@contextmanager
def _style() -> Generator[None]:
    """Apply the report's style over matplotlib's defaults (not the user's) within the context."""
    require_matplotlib()
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # A layer's name may hold letters the font lacks; the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Decorator: draw a figure in the report's style."""

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with _style():
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure with constrained layout; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def depth_colormap() -> Colormap:
    """The color map for depth and time: viridis without its pale yellow end."""
    require_matplotlib()
    from matplotlib.colors import ListedColormap

    return ListedColormap(list(depth_hexes()), name="depth")


def depth_colors(names: Sequence[str]) -> dict[str, str]:
    """Color layers by depth, in colors other than those of schedules."""
    steps, last = depth_hexes(), max(len(names) - 1, 1)
    return {name: steps[i * (len(steps) - 1) // last] for i, name in enumerate(names)}


def score_axis(axes: Axes, metric: Metric) -> None:
    """Format the y axis for a metric: in percent where the metric is a share."""
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(percent_tick if metric.percent else plain_tick))


def point_markers(values: Sequence[float], few: int = 12) -> dict[str, Any]:
    """Markers for a curve of few points, and for points between gaps, which no line shows.

    Example:
        >>> point_markers([1.0, math.nan, 2.0, 3.0], few=2)["markevery"]
        [0]
    """
    finite = [False, *map(math.isfinite, values), False]
    alone = [i for i in range(len(values)) if finite[i : i + 3] == [False, True, False]]
    shown = list(range(len(values))) if sum(finite) <= few else alone
    return {"marker": "o", "markersize": 3, "markevery": shown} if shown else {}


def plain_tick(value: float, _: float) -> str:
    """Format a tick without padding zeros or powers of ten."""
    return f"{value:g}"


def percent_tick(value: float, _: float) -> str:
    """Format a share as a percentage, with no more decimals than needed."""
    return f"{100 * value:.6g}%"


def display_name(name: str, limit: int = 30) -> str:
    """Make a name safe to draw: no markup, one line, shortened in the middle when too long.

    matplotlib reads ``$`` as mathematics and hides labels that begin with an underscore.
    """
    text = "".join(letter if letter.isprintable() else " " for letter in name)
    if len(text) > limit:
        head = (limit - 1) // 3
        text = f"{text[:head]}…{text[-(limit - 1 - head) :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def display_names(names: Sequence[str], limit: int = 30) -> list[str]:
    """Make the names of one figure safe to draw, and still different where they are shortened.

    The parts that all of them begin and end with are cut first, then the middle; names that are
    still the same get numbers.

    Example:
        >>> display_names(["encoder.0.attention.query", "encoder.1.attention.query"], 12)
        ['…0…', '…1…']
    """
    for tried in (names, _without_common(names)):
        shown = [display_name(name, limit) for name in tried]
        if len(set(shown)) == len(set(names)):
            return shown
    return [f"{display_name(name, limit - 6)} ({i})" for i, name in enumerate(names, start=1)]


def _without_common(names: Sequence[str]) -> list[str]:
    def common(rows: Sequence[Sequence[str]]) -> int:
        return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))))

    parts = [name.split(".") for name in names]
    first = common(parts)
    last = common([row[first:][::-1] for row in parts])
    inner = [".".join(row[first : len(row) - last]) for row in parts]
    return [f"{'…' * (first > 0)}{name}{'…' * (last > 0)}" for name in inner]


def inline_svg(figure: Figure, prefix: str) -> str:
    """Render an ``<svg>`` to inline in a page: prefixed ids, colors that follow the theme."""
    file = StringIO()
    with _style():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r"<[^<>]+>", lambda tag: _prefixed(tag.group(), prefix), svg).strip()
    return themed(svg)


def _prefixed(tag: str, prefix: str) -> str:
    tag = re.sub(r' id="', f' id="{prefix}-', tag)
    return tag.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure whole, or leave the file that is there; the name's ending is its format.

    Args:
        figure: the figure.
        path: the file.
        options: those of ``Figure.savefig``.
    """
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix[1:], **options)
