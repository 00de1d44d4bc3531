from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dynarank import Rank
from dynarank.decompositions import decomposition_names, get_decomposition
from dynarank.forms import RankLike

CONV = (64, 16, 3, 3)  # n = 64, m = 144, limit 64, break-even 44.3
TALL = (64, 2)  # n = 64, m = 2, limit 2, break-even 1.94
SVD = get_decomposition("svd")

shapes = st.lists(st.integers(1, 70), min_size=2, max_size=5).map(tuple)
shares = st.floats(0, 1, exclude_min=True)


@pytest.mark.parametrize(
    ("shape", "limit"),
    [((5, 3), 3), ((3, 5), 3), ((4, 4), 4), ((64, 3, 3, 3), 27), ((64, 16, 3, 3), 64), ((8, 1), 1)],
)
def test_the_limit_is_the_shorter_side_of_the_matricized_weight(
    shape: tuple[int, ...], limit: int
) -> None:
    assert SVD.resolve_rank(limit, shape) == limit
    with pytest.raises(ValueError, match=f"above the limit {limit}"):
        SVD.resolve_rank(limit + 1, shape)


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [
        (1, CONV, 1),
        (64, CONV, 64),
        (np.int64(8), CONV, 8),
        (0.5, CONV, 22),
        (1.0, CONV, 44),
        (np.float64(0.5), CONV, 22),
        (0.001, CONV, 1),
        (0.5, (64, 64), 16),
        (0.5, (256, 64), 25),
        (0.5, (64, 256), 25),
        (0.5, TALL, 1),
        (1.0, TALL, 1),
        (Rank(0.5), CONV, 22),
        (Rank(0.999, of="out"), CONV, 63),
        (Rank(1 / 64, of="out"), CONV, 1),
        (Rank(0.5, of="out"), CONV, 32),
        (Rank(0.5, of="out"), (16, 64), 8),
        (Rank(0.5, of="out"), (64, 16), 16),
        (Rank(0.5, of="out"), TALL, 2),
        (Rank(0.25, of="out"), (64, 24), 16),
        (Rank(0.5, of="min"), (64, 16), 8),
        (Rank(0.5, of="min"), (16, 64), 8),
        (Rank(1.0, of="min"), CONV, 64),
        (Rank(1.0, of="cost"), (8, 8), 4),
    ],
    ids=str,
)
def test_a_rank_is_resolved_against_the_shape(
    rank: RankLike, shape: tuple[int, ...], expected: int
) -> None:
    resolved = SVD.resolve_rank(rank, shape)
    assert resolved == expected
    assert type(resolved) is int


@settings(deadline=None, max_examples=60)
@given(shares, st.sampled_from(["out", "min"]), shapes)
def test_a_share_is_rounded_down_between_1_and_the_limit(
    value: float, of: str, shape: tuple[int, ...]
) -> None:
    n, m = shape[0], math.prod(shape[1:])
    whole = {"out": Fraction(n), "min": Fraction(min(n, m))}
    exact = Fraction(value) * whole[of]
    resolved = SVD.resolve_rank(Rank(value, of=of), shape)  # type: ignore[arg-type]
    assert 1 <= resolved <= min(n, m)
    if exact < 1:
        assert resolved == 1
    elif exact > min(n, m):
        assert resolved == min(n, m)
    else:  # rounding may carry the product over a whole number, either way
        assert exact * Fraction(1 - 1e-12) - 1 < resolved <= exact * Fraction(1 + 1e-12)


@settings(deadline=None, max_examples=100)
@given(
    shares,
    shapes,
    st.sampled_from(["svd", "tucker", "cp", "separable"]),
    st.sampled_from([1, 2, 5]),
)
def test_a_float_is_the_largest_rank_within_that_share_of_the_parameters(
    value: float, shape: tuple[int, ...], name: str, groups: int
) -> None:
    decomposition = get_decomposition(name, groups)
    shape = (shape[0] * groups, *shape[1:])
    rank = decomposition.resolve_rank(value, shape)
    allowed = Fraction(value * math.prod(shape))
    assert 1 <= rank <= decomposition.limit(shape)
    if rank > 1:
        assert decomposition.size(shape, rank) <= allowed
    if rank < decomposition.limit(shape):
        assert decomposition.size(shape, rank + 1) > allowed


@pytest.mark.parametrize("name", decomposition_names()[:4])
@pytest.mark.parametrize(
    "shape",
    [(512, 512), (2048, 512), (512, 2048), (256, 64, 3, 3), (64, 256, 1, 1), (96, 96, 7, 7)],
)
def test_half_is_half_of_the_cost_in_every_shape_and_decomposition(
    name: str, shape: tuple[int, ...]
) -> None:
    decomposition = get_decomposition(name)
    rank = decomposition.resolve_rank(0.5, shape)
    share = decomposition.size(shape, rank) / math.prod(shape)
    assert 0.47 < share <= 0.5 or rank == decomposition.limit(shape)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 100), shapes)
def test_an_int_is_itself_up_to_the_limit_and_an_error_above(
    rank: int, shape: tuple[int, ...]
) -> None:
    if rank <= min(shape[0], math.prod(shape[1:])):
        assert SVD.resolve_rank(rank, shape) == rank
    else:
        with pytest.raises(ValueError, match="above the limit"):
            SVD.resolve_rank(rank, shape)


def test_the_error_above_the_limit_names_value_limit_shape_and_what_to_do() -> None:
    with pytest.raises(ValueError) as error:
        SVD.resolve_rank(65, [64, 16, 3, 3])
    for part in ("rank 65", "limit 64", "(64, 16, 3, 3)", "at most 64", "share such as 0.5"):
        assert part in str(error.value)


@pytest.mark.parametrize("rank", [0.0, 1.5, math.nan])
def test_resolving_refuses_an_impossible_share(rank: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        SVD.resolve_rank(rank, CONV)


@pytest.mark.parametrize("rank", [0, -3, True, False])
def test_resolving_refuses_an_impossible_int(rank: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        SVD.resolve_rank(rank, CONV)
