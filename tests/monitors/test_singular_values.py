from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dynarank import UnfitWeightError
from dynarank.monitors.singular_values import (
    effective_rank,
    energy_rank,
    product_singular_values,
    singular_values,
    spectral_ratio,
    stable_rank,
)


def spectrum(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weight(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# Singular values.

shapes = st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple)
# Relative to the largest value; below fp64 the Gram matrix resolves down to sqrt(eps).
ERROR = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7}
QUICK = {torch.float64: 1e-13, torch.float32: 5e-4, torch.bfloat16: 5e-4, torch.float16: 5e-4}


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from(sorted(ERROR, key=str)), st.integers(0, 99))
def test_singular_values_are_those_of_the_matricized_weight(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    tensor = weight(shape, seed, dtype)
    expected = torch.linalg.svdvals(tensor.double().reshape(shape[0], -1))
    for exact, error in [(True, ERROR), (False, QUICK)]:
        actual = singular_values(tensor, exact=exact)
        assert actual.dtype == torch.float64
        assert actual.shape == (min(shape[0], math.prod(shape[1:])),)
        assert (actual - expected).abs().max() <= error[dtype] * expected[0]


@pytest.mark.parametrize("dtype", sorted(ERROR, key=str), ids=str)
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 5, 3, 3), (64, 2, 3, 3)], ids=str)
def test_singular_values_of_a_rank_deficient_weight_end_in_almost_zero(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tall, wide = weight((shape[0], 4), 1), weight((4, math.prod(shape[1:])), 2)
    integers = (tall.round() @ wide.round()).reshape(shape)
    assert integers.abs().max() <= 256  # exact in every dtype
    tensor = integers.to(dtype)
    values = singular_values(tensor)
    expected = torch.linalg.svdvals(tensor.double().flatten(1))
    assert (values - expected).abs().max() <= ERROR[dtype] * expected[0]
    assert values[4:].max() <= 1e-7 * values[0]
    assert (values >= 0).all() and (values[:-1] >= values[1:]).all()


def test_fp64_resolves_what_a_gram_matrix_cannot() -> None:
    values = singular_values(torch.diag(spectrum(1.0, 1e-12)))
    assert values[1].item() == pytest.approx(1e-12, rel=1e-3)


def test_the_weight_is_detached_and_unchanged() -> None:
    tensor = weight((4, 3)).requires_grad_()
    before = tensor.detach().clone()
    assert not singular_values(tensor).requires_grad
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("dtype", sorted(ERROR, key=str), ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_unfit(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 4, dtype=dtype)
    tensor[1, 2] = bad
    with pytest.raises(UnfitWeightError, match="NaN or infinite"):
        singular_values(tensor)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_weight_has_two_dimensions_or_more(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two or more dimensions") as error:
        singular_values(torch.ones(shape))
    assert str(shape) in str(error.value)
    assert not isinstance(error.value, UnfitWeightError)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 3, 0), (0, 3, 0)], ids=str)
def test_a_weight_of_size_zero_has_no_singular_values(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    values = singular_values(torch.ones(shape, dtype=dtype))
    assert values.shape == (0,)
    assert values.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_decomposition_that_fails_is_an_unfit_weight(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svdvals", fail)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    with pytest.raises(UnfitWeightError, match=r"shape \(2, 3, 1\) failed: did not converge"):
        singular_values(torch.ones(2, 3, 1, dtype=dtype))


def with_spectrum(values: Tensor, m: int) -> Tensor:
    """A (n, m) weight in fp32 with these n singular values."""
    n = len(values)
    left, right = (torch.linalg.qr(weight((k, n), k))[0] for k in (n, m))
    return ((left * values) @ right.T).float()


MEASURES = [effective_rank, stable_rank, energy_rank, lambda s: spectral_ratio(s, 25)]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("m", [100, 400])
def test_the_measures_are_within_half_a_percent(power: float, m: int) -> None:
    tensor = with_spectrum(torch.arange(1, 101).double() ** -power, m)
    exact, quick = torch.linalg.svdvals(tensor.double()), singular_values(tensor)
    for measure in MEASURES:
        assert measure(quick) == pytest.approx(measure(exact), rel=5e-3)


@pytest.mark.parametrize("rank", [1, 5, 30, 90])
def test_the_measures_of_a_low_rank_weight_are_within_half_a_percent(rank: int) -> None:
    tensor = (weight((100, rank)) @ weight((rank, 200), 1)).float()
    exact, quick = torch.linalg.svdvals(tensor.double()), singular_values(tensor)
    for measure in MEASURES:
        assert measure(quick) == pytest.approx(measure(exact), rel=5e-3)


def failing(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    eigvalsh = torch.linalg.eigvalsh

    def fail(matrix: Tensor) -> Tensor:
        if matrix.dtype == dtype:
            raise torch.linalg.LinAlgError("did not converge")
        return eigvalsh(matrix)

    return fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_one_method_fails_the_next_is_taken(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = weight((6, 9), dtype=torch.float32)
    monkeypatch.setattr(torch.linalg, "eigvalsh", failing(dtype))
    expected = torch.linalg.svdvals(tensor.double())
    values = singular_values(tensor, exact=dtype == torch.float64)
    assert (values - expected).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e38])
def test_no_scale_over_or_underflows(scale: float) -> None:
    tensor = torch.diag(torch.tensor([2.0, 1.0, 0.5])) * scale
    assert (singular_values(tensor) / scale).tolist() == pytest.approx([2, 1, 0.5], rel=1e-4)
    down, up = torch.eye(3) * math.sqrt(scale), tensor / math.sqrt(scale)
    values = product_singular_values(down, up) / scale
    assert values.tolist() == pytest.approx([2, 1, 0.5], rel=1e-4)


# In product form.


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_a_products_singular_values_come_from_its_factors(
    n: int, m: int, rank: int, seed: int
) -> None:
    down, up = weight((rank, m), seed), weight((n, rank), seed + 100)
    expected = torch.linalg.svdvals(up @ down)
    actual = product_singular_values(down, up)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-13 * expected[0]


def test_a_product_of_rank_r_has_zeros_after_r_values() -> None:
    values = product_singular_values(weight((2, 9)).bfloat16(), weight((7, 2)).bfloat16())
    assert values.shape == (7,) and values[1] > 0 and not values[2:].any()


# Measures, on spectra computed by hand.


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((5.0,), 1.0),
        ((7.0, 0.0, 0.0), 1.0),
        ((2.0, 2.0, 2.0), 3.0),
        ((2.0, 2.0, 2.0, 0.0), 3.0),
        ((2.0, 1.0, 1.0), 2 * math.sqrt(2)),  # H = log(2) / 2 + 2 log(4) / 4 = 1.5 log 2
        ((3.0, 1.0), 4 / 3**0.75),
        ((), 0.0),
        ((0.0, 0.0), 0.0),
    ],
)
def test_effective_rank(values: tuple[float, ...], expected: float) -> None:
    assert effective_rank(spectrum(*values)) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((5.0,), 1.0),
        ((7.0, 0.0), 1.0),
        ((2.0, 2.0, 2.0), 3.0),
        ((2.0, 1.0, 1.0), 1.5),
        ((1e200, 1e200), 2.0),
        ((1e-200, 1e-200), 2.0),
        ((), 0.0),
        ((0.0, 0.0), 0.0),
    ],
)
def test_stable_rank(values: tuple[float, ...], expected: float) -> None:
    assert stable_rank(spectrum(*values)) == expected


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ((3.0, 1.0), 0.9, 1),  # exactly the share
        ((3.0, 1.0), 0.91, 2),
        ((2.0, 2.0, 2.0, 2.0), 0.5, 2),
        ((2.0, 2.0, 2.0, 2.0), 0.51, 3),
        ((2.0, 2.0, 2.0, 2.0), 1.0, 4),
        ((2.0, 1.0, 0.0, 0.0), 1.0, 2),
        ((1.0,), 1e-9, 1),
        ((), 0.5, 0),
        ((0.0, 0.0), 0.5, 0),
    ],
)
def test_energy_rank(values: tuple[float, ...], share: float, expected: int) -> None:
    rank = energy_rank(spectrum(*values), share)
    assert rank == expected
    assert type(rank) is int


def test_energy_rank_keeps_99_percent_unless_told() -> None:
    assert energy_rank(spectrum(1.0, 0.1)) == 1  # 1 / 1.01 = .9901
    assert energy_rank(spectrum(1.0, 0.102)) == 2  # 1 / 1.0104 = .9897


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_an_energy_share_lies_in_0_to_1(share: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\], got"):
        energy_rank(spectrum(1.0), share)


@pytest.mark.parametrize(
    ("values", "rank", "expected"),
    [
        ((3.0, 1.0), 1, 0.75),
        ((3.0, 1.0), 2, 1.0),
        ((3.0, 1.0), 9, 1.0),
        ((2.0, 2.0, 2.0, 2.0), 3, 0.75),
        ((5.0, 3.0, 0.0), 2, 1.0),
        ((0.0, 0.0), 1, 1.0),
        ((), 1, 1.0),
    ],
)
def test_spectral_ratio(values: tuple[float, ...], rank: int, expected: float) -> None:
    assert spectral_ratio(spectrum(*values), rank) == expected


@pytest.mark.parametrize("rank", [0, -1])
def test_lambda_needs_a_rank(rank: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {rank}"):
        spectral_ratio(spectrum(3.0, 1.0), rank)


# What holds for every spectrum.

spectra = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12).map(
    lambda values: spectrum(*sorted(values, reverse=True))
)
SLACK = 1 + 1e-12  # for rounding


@settings(deadline=None, max_examples=100)
@given(spectra, st.integers(0, 4))
def test_the_measures_are_ordered(values: Tensor, zeros: int) -> None:
    """1 <= sum s^2 / s1^2 <= sum s / s1 <= exp(H) <= the number of values that are not zero."""
    padded = torch.cat([values, values.new_zeros(zeros)])
    nuclear = 1 / spectral_ratio(padded, 1)
    assert stable_rank(padded) >= 1
    assert stable_rank(padded) <= nuclear * SLACK
    assert nuclear <= effective_rank(padded) * SLACK
    assert effective_rank(padded) <= len(values) * SLACK
    assert 1 <= energy_rank(padded, 1.0) <= len(values)


@settings(deadline=None, max_examples=60)
@given(spectra)
def test_lambda_increases_to_one_and_is_at_least_flat(values: Tensor) -> None:
    n = len(values)
    ratios = [spectral_ratio(values, r) for r in range(1, n + 1)]
    assert ratios[-1] == pytest.approx(1.0, rel=1e-14)
    assert all(one <= two * SLACK for one, two in pairwise(ratios))
    assert all(ratio * SLACK >= r / n for r, ratio in enumerate(ratios, start=1))


@settings(deadline=None, max_examples=60)
@given(spectra, st.integers(-30, 30))
def test_the_measures_do_not_depend_on_scale(values: Tensor, power: int) -> None:
    scaled = values * 2.0**power  # no rounding
    assert effective_rank(scaled) == effective_rank(values)
    assert stable_rank(scaled) == stable_rank(values)
    assert energy_rank(scaled, 0.9) == energy_rank(values, 0.9)
    assert spectral_ratio(scaled, 2) == spectral_ratio(values, 2)


@settings(deadline=None, max_examples=60)
@given(spectra, st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_the_energy_rank_is_the_least_that_keeps_the_share(
    values: Tensor, one: float, two: float
) -> None:
    rank, energy = energy_rank(values, one), values.square()
    assert energy[:rank].sum() >= one * energy.sum() * (1 - 1e-12)
    assert energy[: rank - 1].sum() < one * energy.sum() * SLACK
    assert energy_rank(values, min(one, two)) <= energy_rank(values, max(one, two))
