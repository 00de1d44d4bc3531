"""The colors of schedules and forms: a schedule's are hues, a form's are grays and a hatch.

A named schedule has one color on every page and in every figure. All colors have a contrast of at
least 3:1 with the background, on light and on dark pages (WCAG 2.2, 1.4.11). Those of the named
schedules were chosen one after the other, each as far as possible from the earlier ones in OKLab
as seen with normal vision, protanopia, deuteranopia and tritanopia (Machado et al. 2009).
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import count

__all__ = ["FORM_COLORS", "FORM_HATCHES", "SCHEDULE_COLORS", "luminance", "schedule_colors"]

SCHEDULE_COLORS = {  # light, dark
    "full-rank": ("#0072b2", "#3a9be0"),
    "low-rank": ("#d55e00", "#f0763a"),
    "dynamic-rank": ("#009e73", "#1fbf93"),
    "decay": ("#6b0f6b", "#f4aff4"),
    "dynamic-rank-low": ("#2500e0", "#775ff2"),
    "aligned": ("#005200", "#4cf04c"),
    "published": ("#245f6b", "#308191"),
    "lora": ("#a11745", "#e2326c"),
    "relora": ("#c275d1", "#b14fc4"),
    "pufferfish": ("#a35200", "#b3610f"),
    "cuttlefish": ("#e000e0", "#f25ff2"),
    "growing": ("#143d1b", "#7dd48b"),
    "rotating": ("#6d00a3", "#edd0fb"),
    "closed-loop": ("#993388", "#cf6ebe"),
}
FORM_COLORS = {  # light, dark
    "full-rank": ("#39424e", "#d5dce4"),
    "low-rank": ("#6b7785", "#8b97a5"),
    "adapted": ("#525d6a", "#aab5c0"),
}
FORM_HATCHES = {"adapted": "////"}
_APART = 96  # of 765, the sum over red, green and blue; less where many colors are taken


def schedule_colors(names: Iterable[str]) -> dict[str, str]:
    """The color, as drawn on white, of each schedule of a page; no two have the same.

    A name that is not in the catalog has a color by its hash, which is another one only where it
    would be close to one that is taken. Of a name with its recipe, ``digits: low-rank``, the
    schedule counts.

    Example:
        >>> schedule_colors(["low-rank", "mine"])["low-rank"]
        '#d55e00'
    """
    names = list(dict.fromkeys(names))
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (": " in name, name)):
        known = SCHEDULE_COLORS.get(name) or SCHEDULE_COLORS.get(name.rpartition(": ")[2])
        if known and known[0] not in found.values():
            found[name] = known[0]
    for name in sorted(set(names) - set(found)):
        found[name] = _hashed(name, list(found.values()))
    return {name: found[name] for name in names}


def luminance(color: str) -> float:
    """The relative luminance of WCAG, from 0 for black to 1 for white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _parts(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hashed(name: str, taken: Sequence[str]) -> str:
    for attempt in count():
        hue, saturation, bright = sha256(f"{name}{attempt or ''}".encode()).digest()[:3]
        color = _of_luminance(hue / 256, 0.5 + saturation / 512, 0.14 + bright / 2000)
        if all(_distance(color, other) > max(_APART - attempt, 0) for other in taken):
            return color
    raise AssertionError("there are more colors than schedules")


def _of_luminance(hue: float, saturation: float, target: float) -> str:
    """A color of a luminance between .14 and .27: at least 3:1 both on white and on dark pages."""
    shades = (colorsys.hls_to_rgb(hue, shade / 256, saturation) for shade in range(256))
    written = ("#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in shades)
    return next(color for color in written if luminance(color) >= target)


def _distance(one: str, other: str) -> float:
    return 255 * sum(abs(a - b) for a, b in zip(_parts(one), _parts(other), strict=True))


def _parts(color: str) -> list[float]:
    return [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
