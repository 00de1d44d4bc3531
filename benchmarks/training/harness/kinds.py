"""The kinds of arms, by how their names begin."""

from __future__ import annotations

KINDS = ("full rank", "fixed", "narrower", "shorter", "decay", "full first", "paper")
OTHER = "other"
"""Related methods."""


def kind(arm: str) -> str:
    """The kind of an arm.

    Example:
        >>> kind("decay 0.5, 8 batches"), kind("ReLoRA")
        ('decay', 'other')
    """
    return next((name for name in KINDS if arm.startswith(name)), OTHER)
