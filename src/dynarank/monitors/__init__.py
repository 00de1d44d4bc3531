"""Monitors of spectra, activations and gradients. They are read-only and never change a run."""
