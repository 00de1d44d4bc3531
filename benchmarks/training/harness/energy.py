"""The energy that the processor has used, where the system tells it."""

from __future__ import annotations

from pathlib import Path

_DOMAINS = Path("/sys/class/powercap")
Counters = dict[Path, int]
"""Microjoules by package."""


def counters(domains: Path = _DOMAINS) -> Counters | None:
    """The energy counters of all packages (Intel RAPL, also on AMD); None: not readable.

    The counters are of the whole machine, so a figure is that of a run only if it ran alone.
    """
    try:
        found = {path: _read(path / "energy_uj") for path in domains.glob("intel-rapl:?")}
    except OSError:
        return None
    return found or None


def joules(before: Counters | None, after: Counters | None) -> float | None:
    """The energy between two readings; a counter begins again after its largest value."""
    if before is None or after is None:
        return None
    return sum(_since(path, before[path], after[path]) for path in before) / 1e6


def _since(path: Path, before: int, after: int) -> int:
    if after >= before:
        return after - before
    return after - before + _read(path / "max_energy_range_uj") + 1


def _read(path: Path) -> int:
    return int(path.read_text())
