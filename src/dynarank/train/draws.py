"""Random generators that depend only on seed, purpose and epoch."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["epoch_generator"]


def epoch_generator(seed: int, stream: int, epoch: int) -> torch.Generator:
    """A CPU generator, independent of the device and of other random draws.

    Args:
        seed: the seed of the run, not negative.
        stream: a number for each purpose; different streams are independent.
        epoch: the epoch, counted from 0.

    Raises:
        ValueError: if ``seed`` or ``epoch`` is negative.

    Example:
        >>> draws = [torch.rand(1, generator=epoch_generator(0, 0, epoch)) for epoch in (3, 3, 4)]
        >>> bool(draws[0] == draws[1]), bool(draws[0] == draws[2])
        (True, False)
    """
    if epoch < 0:
        raise ValueError(f"epochs are counted from 0, got {epoch}")
    if seed < 0:
        raise ValueError(f"a seed must not be negative, got {seed}")
    state = np.random.SeedSequence([seed, stream, epoch]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
