"""Vocabulary: the transition points of its example."""

from __future__ import annotations

PAGE = "docs/vocabulary.md"
SETTINGS = ("above, 0.37 (inflate) and 0.80 (deflate)",)
