"""Read a report: an example of its first line, and the level of its tests."""

from __future__ import annotations

PAGE = "docs/how-to/read-a-report.md"
SETTINGS = (
    "*all at n = 1*",
    "*was 0.56 points better*",
    "at 5% over all pairs",
    "about 1e-7 for inflation",
)
