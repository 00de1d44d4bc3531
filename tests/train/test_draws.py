"""Random choices of an epoch."""

from __future__ import annotations

import pytest
import torch

from dynarank.train.draws import epoch_generator


def test_seed_stream_and_epoch_decide() -> None:
    keys = [(seed, stream, epoch) for seed in range(3) for stream in range(3) for epoch in range(3)]
    draws = {key: torch.rand(4, generator=epoch_generator(*key)).tolist() for key in keys}
    assert len({tuple(draw) for draw in draws.values()}) == 27
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for key, draw in draws.items():
        assert torch.rand(4, generator=epoch_generator(*key)).tolist() == draw
    assert torch.equal(state, torch.get_rng_state())


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="epochs are counted from 0, got -1"):
        epoch_generator(0, 0, -1)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        epoch_generator(-1, 0, 0)
