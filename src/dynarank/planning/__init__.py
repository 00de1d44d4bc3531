"""Which schedule for this model and run: fitted to a budget, or found by a probe."""
