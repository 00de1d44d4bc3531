"""The clocks of a device while it works: it is slower when it is hot or at its power limit."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from benchmarks.gpu.device import Device

__all__ = ["summary", "watched"]

_EVERY = 2.0  # seconds
_KEYS = "clocks.sm", "power.draw", "temperature.gpu"


@contextmanager
def watched(device: Device, every: float = _EVERY) -> Generator[list[dict[str, str]]]:
    """Read the clocks at once and every few seconds; the list is filled meanwhile.

    Args:
        device: the device.
        every: seconds between two looks.
    """
    found: list[dict[str, str]] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            found.append(device.clocks())
            over.wait(every)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def summary(readings: Sequence[dict[str, str]]) -> dict[str, list[float]]:
    """The least, median and largest of what was read, in MHz, W and degrees Celsius.

    Example:
        >>> summary([{"clocks.sm": "1980 MHz"}, {"clocks.sm": "1200 MHz"}, {}])
        {'clocks.sm': [1200.0, 1590.0, 1980.0]}
    """
    read = {key: [_number(one[key]) for one in readings if key in one] for key in _KEYS}
    known = {key: [v for v in values if v is not None] for key, values in read.items()}
    return {k: [min(v), statistics.median(v), max(v)] for k, v in known.items() if v}


def _number(text: str) -> float | None:
    """The number before a unit; None if there is none, as in "[N/A]"."""
    try:
        return float(text.split()[0])
    except (IndexError, ValueError):
        return None
