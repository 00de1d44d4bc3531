"""Related methods as schedules, one per file."""
