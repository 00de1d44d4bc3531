"""What is read of a model: spectra, activations and gradients. Nothing here changes a run."""
