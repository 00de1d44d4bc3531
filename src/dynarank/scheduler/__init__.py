"""Who drives: the rank scheduler, which asks a schedule once a step and applies the answer."""
