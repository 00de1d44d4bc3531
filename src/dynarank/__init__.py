"""dynarank: dynamic-rank training for PyTorch."""
