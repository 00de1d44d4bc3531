"""Monitors of spectra, activations and gradients. They are read-only and never change a run."""

from dynarank.files.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
