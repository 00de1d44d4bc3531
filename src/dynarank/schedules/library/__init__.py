"""Related methods as schedules, one a file."""
