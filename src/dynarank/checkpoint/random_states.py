"""The states of the global random generators: Python's, NumPy's, torch's on every device."""

from __future__ import annotations

import random
import sys
from importlib import import_module
from typing import Any

import torch

__all__ = ["random_states", "set_random_states"]


def random_states() -> dict[str, Any]:
    """The states of all global generators, as plain data and tensors; NumPy's if it is imported."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        states["numpy"] = numpy.random.get_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Give all global generators these states; those of devices that are not there are left out."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        import_module("numpy").random.set_state(states["numpy"])
    for device, state in enumerate(states.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
