"""The error of a recipe that is unknown or cannot be run."""

from __future__ import annotations

__all__ = ["RecipeError"]


class RecipeError(ValueError):
    """Raised for an unknown recipe, or one that cannot be run as requested."""
