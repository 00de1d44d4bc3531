"""Allocation: how ranks are found, by a rule or within a budget."""
