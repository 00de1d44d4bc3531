from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynarank.contrib.noise_estimate import (
    Average,
    Estimate,
    from_norms,
    from_shards,
    noise_scale,
    squared_norm,
)


def samples(count: int, size: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, size, dtype=torch.float64, generator=generator) + 0.5


def executions(count: int, shards: int) -> Iterator[list[list[int]]]:
    """All ways to deal ``count`` samples into equal shards, in order."""
    each = count // shards
    for order in itertools.permutations(range(count)):
        parts = [list(order[i : i + each]) for i in range(0, count, each)]
        if all(part == sorted(part) for part in parts):
            yield parts


@pytest.mark.parametrize(("count", "shards"), [(4, 2), (6, 2), (6, 3), (6, 6)])
def test_over_all_ways_to_shard_a_batch_the_mean_is_the_samples_own(
    count: int, shards: int
) -> None:
    """Unbiased: S averages to the trace of the sample covariance, Q to the U-statistic of |G|^2."""
    x = samples(count)
    found = [
        from_shards(([x[part].mean(0)] for part in parts), count // shards)[0]
        for parts in executions(count, shards)
    ]
    trace = float(x.var(0, correction=1).sum())
    pairs = float((x.sum(0).square() - x.square().sum(0)).sum()) / (count * (count - 1))
    assert math.fsum(e.noise for e in found) / len(found) == pytest.approx(trace, rel=1e-12)
    assert math.fsum(e.signal for e in found) / len(found) == pytest.approx(pairs, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.integers(1, 50), st.integers(0, 99))
def test_shards_and_norms_agree(shards: int, each: int, seed: int) -> None:
    torch.manual_seed(seed)
    gradients = [torch.randn(4, 3, dtype=torch.float64) for _ in range(shards)]
    (found,) = from_shards(([g] for g in gradients), each)
    small = sum(squared_norm(g) for g in gradients) / shards
    large = squared_norm(torch.stack(gradients).mean(0))
    expected = from_norms(small, large, (each, each * shards))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_two_halves_give_half_their_distance_and_their_inner_product() -> None:
    a, b = samples(2)
    (found,) = from_shards([[a], [b]], 5)
    assert found.noise == pytest.approx(5 * float((a - b).square().sum()) / 2)
    assert found.signal == pytest.approx(float(a @ b))


def test_little_noise_in_single_precision_is_not_lost_in_a_difference() -> None:
    a = torch.full((1000,), 1.0)
    b = a + torch.tensor([1e-5, -1e-5]).repeat(500)
    (found,) = from_shards([[a], [b]], 1)
    assert found.noise == pytest.approx(0.5 * float((a - b).double().square().sum()), rel=1e-4)


def test_a_gradient_that_is_missing_is_zero() -> None:
    g = torch.tensor([2.0, 0.0])
    zero = torch.zeros(2)
    for missing, whole in [
        ([None, g], [zero, g]),
        ([g, None], [g, zero]),
        ([None, None], [zero] * 2),
    ]:
        assert from_shards([[m] for m in missing], 3) == from_shards([[w] for w in whole], 3)


def test_a_sparse_gradient_is_read() -> None:
    dense = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    shards = [[dense.to_sparse()], [2 * dense.to_sparse()]]
    assert from_shards(shards, 1) == from_shards([[dense], [2 * dense]], 1)


def test_gradients_are_left_as_they_are() -> None:
    g = torch.ones(3)
    from_shards([[g], [2 * g], [g]], 1)
    assert g.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("shards", [[], [[torch.ones(2)]]], ids=len)
def test_fewer_than_two_shards_are_an_error(shards: list[list[torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match=f"two or more shards of a batch, got {len(shards)}"):
        from_shards(shards, 1)


def test_an_empty_shard_is_an_error() -> None:
    with pytest.raises(ValueError, match="samples=0"):
        from_shards([[torch.ones(2)]] * 2, 0)


def test_an_average_is_without_bias_and_forgets() -> None:
    average = Average(0.5)
    average.add(Estimate(1.0, 8.0))
    average.add(Estimate(4.0, 2.0))
    assert average.value == pytest.approx(
        ((0.25 * 1 + 0.5 * 4) / 0.75, (0.25 * 8 + 0.5 * 2) / 0.75)
    )


def test_the_scale_of_parts_is_of_their_sums() -> None:
    assert noise_scale([Estimate(6.0, 2.0), Estimate(2.0, -1.0)]) == 8.0
    assert noise_scale([Estimate(6.0, -2.0)]) == math.inf
    assert noise_scale([Estimate(-6.0, 2.0)]) == 0.0
    assert math.isnan(noise_scale([Estimate(0.0, 0.0)]))
