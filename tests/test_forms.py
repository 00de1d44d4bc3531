from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dynarank import Adapted, FullRank, LowRank, Rank
from dynarank.forms import RankLike, form_name, resolve_rank
from dynarank.layers import WeightSpec

CONV = (64, 16, 3, 3)  # n = 64, m = 144, limit 64, break-even 44.3
TALL = (64, 2)  # n = 64, m = 2, limit 2, break-even 1.94

shapes = st.lists(st.integers(1, 70), min_size=2, max_size=5).map(tuple)
shares = st.floats(0, 1, exclude_min=True)


@pytest.mark.parametrize(
    ("shape", "limit"),
    [((5, 3), 3), ((3, 5), 3), ((4, 4), 4), ((64, 3, 3, 3), 27), ((64, 16, 3, 3), 64), ((8, 1), 1)],
)
def test_the_limit_is_the_shorter_side_of_the_matricized_weight(
    shape: tuple[int, ...], limit: int
) -> None:
    assert resolve_rank(limit, shape) == limit
    with pytest.raises(ValueError, match=f"above the limit {limit}"):
        resolve_rank(limit + 1, shape)


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [
        (1, CONV, 1),
        (64, CONV, 64),
        (np.int64(8), CONV, 8),
        (0.5, CONV, 32),
        (1.0, CONV, 64),
        (np.float64(0.5), CONV, 32),
        (0.999, CONV, 63),
        (0.001, CONV, 1),
        (1 / 64, CONV, 1),
        (Rank(0.5), (16, 64), 8),
        (Rank(0.5, of="out"), (64, 16), 16),
        (Rank(0.25, of="out"), (64, 24), 16),
        (Rank(0.5, of="min"), (64, 16), 8),
        (Rank(0.5, of="min"), (16, 64), 8),
        (Rank(1.0, of="min"), CONV, 64),
        (Rank(1.0, of="break-even"), CONV, 44),
        (Rank(0.5, of="break-even"), CONV, 22),
        (Rank(1.0, of="break-even"), (8, 8), 4),
        (Rank(1.0, of="break-even"), TALL, 1),
        (0.5, TALL, 2),
        (1.0, TALL, 2),
    ],
    ids=str,
)
def test_a_rank_is_resolved_against_the_shape(
    rank: RankLike, shape: tuple[int, ...], expected: int
) -> None:
    resolved = resolve_rank(rank, shape)
    assert resolved == expected
    assert type(resolved) is int


@settings(deadline=None, max_examples=60)
@given(shares, st.sampled_from(["out", "min", "break-even"]), shapes)
def test_a_share_is_rounded_down_between_1_and_the_limit(
    value: float, of: str, shape: tuple[int, ...]
) -> None:
    n, m = shape[0], math.prod(shape[1:])
    whole = {"out": Fraction(n), "min": Fraction(min(n, m)), "break-even": Fraction(m * n, m + n)}
    exact = Fraction(value) * whole[of]
    resolved = resolve_rank(Rank(value, of=of), shape)  # type: ignore[arg-type]
    assert 1 <= resolved <= min(n, m)
    if exact < 1:
        assert resolved == 1
    elif exact > min(n, m):
        assert resolved == min(n, m)
    else:  # rounding may carry the product over a whole number, either way
        assert exact * Fraction(1 - 1e-12) - 1 < resolved <= exact * Fraction(1 + 1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 100), shapes)
def test_an_int_is_itself_up_to_the_limit_and_an_error_above(
    rank: int, shape: tuple[int, ...]
) -> None:
    if rank <= min(shape[0], math.prod(shape[1:])):
        assert resolve_rank(rank, shape) == rank
    else:
        with pytest.raises(ValueError, match="above the limit"):
            resolve_rank(rank, shape)


def test_the_error_above_the_limit_names_value_limit_shape_and_what_to_do() -> None:
    with pytest.raises(ValueError) as error:
        resolve_rank(65, [64, 16, 3, 3])
    for part in ("rank 65", "limit 64", "(64, 16, 3, 3)", "at most 64", "share such as 0.5"):
        assert part in str(error.value)


WRONG = [
    (0, ValueError, "at least 1, got 0"),
    (-3, ValueError, "at least 1, got -3"),
    (np.int64(0), ValueError, "at least 1"),
    (0.0, ValueError, r"\(0, 1\], got 0.0"),
    (-0.5, ValueError, r"\(0, 1\], got -0.5"),
    (1.5, ValueError, r"\(0, 1\], got 1.5.*give an int"),
    (math.nan, ValueError, r"\(0, 1\], got nan"),
    (math.inf, ValueError, r"\(0, 1\], got inf"),
    (True, TypeError, "got True"),
    (False, TypeError, "got False"),
    ("8", TypeError, "got '8'"),
    (None, TypeError, "got None"),
    ((1, 2), TypeError, r"got \(1, 2\)"),
]


@pytest.mark.parametrize(("rank", "kind", "message"), WRONG, ids=repr)
@pytest.mark.parametrize("form", [LowRank, Adapted])
def test_a_form_refuses_an_impossible_rank(
    form: type[LowRank] | type[Adapted], rank: object, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        form(rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0.0, 1.5, math.nan])
def test_resolving_refuses_an_impossible_share(rank: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        resolve_rank(rank, CONV)


@pytest.mark.parametrize("rank", [0, -3, True, False])
def test_resolving_refuses_an_impossible_int(rank: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        resolve_rank(rank, CONV)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf])
def test_a_share_outside_0_to_1_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        Rank(value)


def test_a_share_is_of_one_of_three_things() -> None:
    with pytest.raises(ValueError, match='"out", "min" or "break-even", got \'in\''):
        Rank(0.5, of="in")  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_alpha_must_be_positive_and_finite(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be positive and finite, got"):
        Adapted(2, alpha=alpha)


@pytest.mark.parametrize("execution", ["joined", "", "two_branch", None])
def test_execution_is_one_of_three_words(execution: str) -> None:
    with pytest.raises(ValueError, match="'auto', 'merged', 'two-branch', got"):
        Adapted(2, execution=execution)  # type: ignore[arg-type]


def test_defaults_of_the_forms() -> None:
    assert LowRank(2).decomposition == Adapted(2).decomposition == "svd"
    assert Adapted(2).alpha == 16.0
    assert Adapted(2).execution == "auto"
    assert Rank(0.5).of == "out"


def test_the_scale_is_alpha_over_the_resolved_rank() -> None:
    assert Adapted(4, alpha=6.0).scale == 1.5
    with pytest.raises(ValueError, match=r"a share for a rank.*resolve"):
        _ = Adapted(0.5).scale


def test_a_resolved_form_has_a_whole_number_for_a_rank() -> None:
    form = WeightSpec("weight", (8, 6)).resolve(LowRank(0.5))
    assert isinstance(form, LowRank) and form.resolved_rank == 4
    assert LowRank(np.int64(3)).resolved_rank == 3
    for share in (0.5, Rank(0.5, of="min")):
        with pytest.raises(ValueError, match=r"LowRank\(rank=.*resolve the form with WeightSpec"):
            _ = LowRank(share).resolved_rank


def test_resolving_a_form_changes_its_rank_alone() -> None:
    form = Adapted(Rank(0.5, of="min"), alpha=3.0, execution="two-branch")
    resolve = WeightSpec("weight", (8, 6)).resolve
    assert resolve(form) == Adapted(3, alpha=3.0, execution="two-branch")
    assert resolve(LowRank(0.5)) == LowRank(4)
    assert resolve(FullRank()) == FullRank()


def test_a_form_has_a_name_whatever_its_rank() -> None:
    forms = (FullRank(), LowRank(8), Adapted(0.5))
    assert [form_name(form) for form in forms] == ["full-rank", "low-rank", "adapted"]
