"""Measurements of dynarank, each with its records and the command that repeats it."""
