"""The error of a budget that is less than the least that a model can cost."""

__all__ = ["BudgetError"]


class BudgetError(ValueError):
    """A budget that cannot be met."""
