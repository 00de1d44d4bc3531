"""Allocation of ranks: rules for ranks, and plans and schedules within a budget."""
