"""How are ranks and schedules found: by rules, and within budgets."""
