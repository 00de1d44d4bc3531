"""Decompositions: a test holds the bound on the error."""

from __future__ import annotations

PAGE = "docs/methods/decompositions.md"
SETTINGS = ("arXiv 1412.6553", "are within 0.1% of its error")
