"""The energy that the processor has used, where the system tells it."""

from __future__ import annotations

from pathlib import Path

_DOMAINS = Path("/sys/class/powercap")


def joules(domains: Path = _DOMAINS) -> float | None:
    """The energy counters of all packages (Intel RAPL, also on AMD); None: not readable.

    The counters are of the whole machine, so a figure is that of a run only if it ran alone.
    """
    try:
        counters = [path / "energy_uj" for path in domains.glob("intel-rapl:?")]
        return sum(int(path.read_text()) for path in counters) / 1e6 if counters else None
    except OSError:
        return None
