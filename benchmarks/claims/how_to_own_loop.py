"""Your own loop: how much time the spectra may take."""

from __future__ import annotations

PAGE = "docs/how-to/own-loop.md"
SETTINGS = ("spectra at 1% of the time",)
