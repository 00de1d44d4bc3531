"""PEFT: what a test holds."""

from __future__ import annotations

PAGE = "docs/how-to/peft.md"
SETTINGS = ("equal the model's to 1e-6 of the largest",)
