"""The light and dark theme of the page and its figures.

A figure is drawn in the light colors. Inlined in a page, each color becomes a CSS variable with
the drawn color as its fallback, so that one SVG serves both themes; a figure file stays as drawn.
"""

from __future__ import annotations

import re
from functools import cache

from dynarank.report.colors import FORM_COLORS, SCHEDULE_COLORS

__all__ = [
    "DEPTH",
    "INK",
    "NEUTRAL",
    "css_variables",
    "depth_hexes",
    "themed",
    "themed_color",
]

INK = "#24292f"
NEUTRAL = "#6e7781"
# Viridis without the yellow end on white, and without the darkest violet on a dark page.
DEPTH = 48
_LIGHT_END, _DARK_START = 0.88, 0.24
_PAGE = {  # name: light, dark
    "page": ("#ffffff", "#12161b"),
    "ink": (INK, "#e6e9ec"),
    "soft": ("#59636e", "#9aa4af"),
    "line": ("#d1d9e0", "#323a43"),
    "faint": ("#f6f8fa", "#1a2027"),
    "note": ("#fff8e6", "#2a2413"),
    "note-line": ("#d4a72c", "#9a7b21"),
    "accent": ("#0969da", "#58a6ff"),
    "shadow": ("#8c959f66", "#9aa4af66"),
}
_PAIRS = {f"s{i}": pair for i, pair in enumerate(SCHEDULE_COLORS.values())} | {
    f"f{i}": pair for i, pair in enumerate(FORM_COLORS.values())
}
_FIGURE = {  # colors that figures are drawn in, besides those of schedules, forms and depth
    INK: "ink",
    "#57606a": "soft",
    NEUTRAL: "soft",
    "#8c959f": "soft",
    "#d8dee4": "line",
    "#ffffff": "page",
}


@cache
def depth_hexes(dark: bool = False) -> tuple[str, ...]:
    """The colors of the depth scale, first layer to last."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    viridis, last = colormaps["viridis"], DEPTH - 1
    low, high = (_DARK_START, 1.0) if dark else (0.0, _LIGHT_END)
    return tuple(to_hex(viridis(low + (high - low) * i / last)) for i in range(DEPTH))


def css_variables() -> str:
    """The CSS variables of both themes: by the system's preference and by explicit choice."""
    pairs = {
        **_PAGE,
        **_PAIRS,
        **{f"d{i}": p for i, p in enumerate(zip(depth_hexes(), depth_hexes(True), strict=True))},
    }
    light, dark = (
        "".join(f"--{name}:{pair[side]};" for name, pair in pairs.items()) for side in (0, 1)
    )
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light])"
        f"{{color-scheme:dark;{dark}}}}}\n"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}"
    )


@cache
def _variables() -> dict[str, str]:
    named = {light: name for name, (light, _) in _PAIRS.items()}
    named |= {color: f"d{i}" for i, color in enumerate(depth_hexes())}
    return named | _FIGURE


def themed(svg: str) -> str:
    """Replace the colors in a figure's style attributes by the theme's variables.

    Example:
        >>> themed('<path style="stroke: #24292f"/>')
        '<path style="stroke: var(--ink,#24292f)"/>'
    """
    return re.sub(r'(?<=style=")[^"]*', lambda style: _themed_style(style.group()), svg)


def themed_color(color: str) -> str:
    """A style attribute: a background color that follows the theme."""
    return f"background:{variable(color)}"


def _themed_style(style: str) -> str:
    return re.sub(r"#[0-9a-f]{6}", lambda found: variable(found.group()), style)


def variable(color: str) -> str:
    """The CSS variable of a drawn color; other colors are returned as they are."""
    name = _variables().get(color)
    return color if name is None else f"var(--{name},{color})"
