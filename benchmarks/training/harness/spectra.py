"""The spectra of the scheduled layers at one time of a run."""

from __future__ import annotations

from typing import Any

from torch import nn

import dynarank as dr
from dynarank.factors.live_sites import LiveSites
from dynarank.monitors.spectral_reading import read_spectra
from dynarank.schedules.readings import SpectralReading

LAMBDA = dr.Rank(0.25, of="min")
"""The rank at which lambda is taken: a quarter of the largest, in every arm."""

NAMES = ("effective_rank", "stable_rank", "lambda")
"""The order in which a record lists what is read of a layer."""


def spectra(model: nn.Module, layers: Any) -> dict[str, list[float]]:
    """Effective rank, stable rank and lambda of each layer, as they are named in ``NAMES``."""
    return {
        path: [digits(one.effective_rank), digits(one.stable_rank), digits(one.spectral_ratio)]
        for path, one in readings(model, layers).items()
    }


def readings(model: nn.Module, layers: Any, values: int = 0) -> dict[str, SpectralReading]:
    """The readings of the layers, with at most so many singular values; none under PEFT."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        return {}
    return read_spectra(LiveSites(model, layers)(), rank=LAMBDA, values=values)


def digits(value: float, places: int = 4) -> float:
    """The value to a number of significant digits."""
    return float(f"{value:.{places}g}")
