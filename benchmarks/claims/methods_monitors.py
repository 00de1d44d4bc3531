"""docs/methods/monitors.md."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature

from dynarank import SpectralMonitor

PAGE = "docs/methods/monitors.md"
SETTINGS = ("arXiv 1812.06162, 2018",)


def claims() -> Iterator[str]:
    """Yield the share of the time that the monitor has."""
    share = signature(SpectralMonitor).parameters["share"].default
    yield f"as often as fits into {share:.0%} of the time"
