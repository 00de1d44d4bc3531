"""Training aids for factors: initialization, learning rates and regularizers."""
