"""Monitors: how much time their readings take."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature

from dynarank import SpectralMonitor

PAGE = "docs/methods/monitors.md"
SETTINGS: tuple[str, ...] = ()


def claims() -> Iterator[str]:
    """Yield the share of the time that the monitor has."""
    share = signature(SpectralMonitor).parameters["share"].default
    yield f"as often as fits into {share:.0%} of the time"
