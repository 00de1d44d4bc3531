"""Quality against cost of rank schedules: problems, arms, runs, tables."""
