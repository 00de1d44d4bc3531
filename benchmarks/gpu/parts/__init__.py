"""The parts, each a module with a function ``run(bench)``."""
