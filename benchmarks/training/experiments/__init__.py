"""The experiments, a file each: a problem, its arms and seeds."""
