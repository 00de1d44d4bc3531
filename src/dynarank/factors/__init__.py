"""What helps factors train: first values, learning rates, regularizers."""
