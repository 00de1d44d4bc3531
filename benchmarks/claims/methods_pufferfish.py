"""Pufferfish: the paper's times."""

from __future__ import annotations

PAGE = "docs/methods/pufferfish.md"
SETTINGS = ("80 of 300 on CIFAR-10", "the first sixth, 3 of 18")
