"""Random draws of a user's data: a pure function of seed, epoch and example.

Transforms draw from the global generators of torch, Python and NumPy. These are seeded for each
example, and given back afterwards, so that data neither depends on what was drawn before it (a run
can go on at any step) nor changes what is drawn after it (dropout).
"""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["GlobalState", "kept_generators", "seed_generators"]


def seed_generators(*numbers: int) -> None:
    """Seed the CPU generators of torch, Python and NumPy from some numbers."""
    words = np.random.SeedSequence(numbers).generate_state(3, np.uint32)
    torch.default_generator.manual_seed(int(words[0]))
    random.seed(int(words[1]))
    np.random.seed(int(words[2]))


class GlobalState:
    """The states of the CPU generators of torch, Python and NumPy."""

    def __init__(self) -> None:
        self.torch = torch.default_generator.get_state()
        self.python: Any = random.getstate()
        self.numpy: Any = np.random.get_state()

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.default_generator.set_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


@contextmanager
def kept_generators() -> Generator[None]:
    """A context that gives the states of the generators back.

    Example:
        >>> before = torch.random.get_rng_state()
        >>> with kept_generators():
        ...     _ = torch.rand(3)
        >>> bool((torch.random.get_rng_state() == before).all())
        True
    """
    before = GlobalState()
    try:
        yield
    finally:
        before.restore()
