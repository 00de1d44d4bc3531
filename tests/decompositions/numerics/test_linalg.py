from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from laws import TOLERANCE, assert_close
from torch import Tensor

from dynarank.decompositions import Decomposition, UnfitWeightError
from dynarank.decompositions.grouped import Grouped
from dynarank.decompositions.numerics import linalg as la
from dynarank.decompositions.numerics.subspace import follow, subspace_iteration
from dynarank.decompositions.svd import SVD

OPTIMAL = 1.002  # the truncation error allowed, over the least possible
svd = SVD()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(n: int, m: int, power: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, m) with singular values i^-power."""
    k = min(n, m)
    left, right = (torch.linalg.qr(normal(s, k, seed=s))[0] for s in (n, m))
    return ((left * torch.arange(1, k + 1).double() ** -power) @ right.T).to(dtype)


def excess(weight: Tensor, approximation: Tensor, rank: int) -> float:
    """||W - A|| over the error of the best A of this rank."""
    exact = weight.double()
    least = torch.linalg.svdvals(exact)[rank:].square().sum().sqrt()
    return ((exact - approximation.double()).norm() / least).item()


def orthonormal(basis: Tensor) -> bool:
    unit = torch.eye(basis.shape[1], dtype=torch.float64)
    error = (basis.double().T @ basis.double() - unit).abs().max()
    return bool(error <= (1e-12 if basis.dtype == torch.float64 else 2e-5))


# Whatever the matrix, valid factors or a typed error.

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "zeros", "rank-1", "repeated", "huge", "tiny", "nan", "inf", "transposed"]


def of_kind(kind: str, n: int, m: int, seed: int, dtype: torch.dtype) -> Tensor:
    matrix = normal(n, m, seed=seed)
    if kind == "zeros":
        matrix = torch.zeros(n, m)
    elif kind == "rank-1":
        matrix = matrix[:, :1] @ normal(1, m, seed=seed + 1)
    elif kind == "repeated":
        matrix = torch.linalg.svd(matrix, full_matrices=False)[2]  # every value is 1
    elif kind in ("huge", "tiny") and dtype != torch.float16:
        matrix = matrix * (1e30 if kind == "huge" else 1e-30)
    elif kind in ("nan", "inf"):
        matrix.view(-1)[seed % matrix.numel()] = math.nan if kind == "nan" else -math.inf
    elif kind == "transposed":
        return normal(m, n, seed=seed).to(dtype).T
    return matrix.to(dtype)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
    st.data(),
)
def test_any_matrix_gives_valid_factors_or_a_typed_error(
    kind: str, n: int, m: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    matrix = of_kind(kind, n, m, seed, dtype)
    rank = data.draw(st.integers(1, min(matrix.shape)))
    before, state = matrix.clone(), torch.get_rng_state()
    if kind in ("nan", "inf"):
        with pytest.raises(UnfitWeightError, match="NaN or infinite"):
            svd.split(matrix, rank)
    else:
        check_split(matrix, rank)
    assert torch.equal(matrix.nan_to_num(), before.nan_to_num())
    assert torch.equal(torch.get_rng_state(), state)


def check_split(matrix: Tensor, rank: int) -> None:
    down, up = svd.split(matrix, rank)
    assert up.dtype == down.dtype == (matrix.dtype if matrix.dtype in DTYPES[:1] else torch.float32)
    assert down.shape == (rank, matrix.shape[1]) and up.shape == (matrix.shape[0], rank)
    assert torch.isfinite(up).all() and torch.isfinite(down).all()
    exact, joined = matrix.double(), up.double() @ down.double()
    noise = TOLERANCE[up.dtype] * exact.norm()
    least = torch.linalg.svdvals(exact)[rank:].square().sum().sqrt()
    assert (exact - joined).norm() <= OPTIMAL * least + noise
    assert (svd.split(matrix, rank)[1] == up).all()
    # Every direction can learn: where one factor is zero, the other is not.
    assert up.any(0).logical_or(down.any(1)).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_a_matrix_of_size_zero_has_no_directions(shape: tuple[int, int]) -> None:
    basis, values = la.leading_directions(torch.ones(shape), 0)
    assert basis.shape == (shape[0], 0) and values.shape == (0,)
    with pytest.raises(ValueError, match=r"rank 1 is not in \[0, 0\]"):
        la.leading_directions(torch.ones(shape), 1)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e37])
def test_scales_come_back(scale: float) -> None:
    matrix = torch.diag(torch.tensor([2.0, 1.0])) * scale
    assert (la.leading_directions(matrix, 2)[1] / scale).tolist() == pytest.approx([2, 1], rel=1e-4)
    assert_close(svd.join(svd.split(matrix, 2)) / scale, matrix / scale)
    factors = svd.split(matrix, 2)
    assert_close(svd.join(svd.refactor(factors, 1))[:1] / scale, matrix[:1] / scale)


# Accuracy, by each fallback.

SHAPES = [(40, 360), (150, 130), (130, 140)]  # the Gram matrices of the last two are in blocks


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 0.75])
def test_the_truncation_error_is_within_a_fifth_of_a_percent_of_the_least(
    share: float, shape: tuple[int, int], power: float
) -> None:
    weight, rank = with_spectrum(*shape, power), int(share * min(shape))
    down, up = svd.split(weight, rank)
    assert excess(weight, up.double() @ down.double(), rank) <= OPTIMAL or power == 3
    error = (weight.double() - up.double() @ down.double()).norm()
    assert error <= OPTIMAL * excess_free(weight, rank) + 1e-6 * weight.norm()
    sizes = torch.linalg.vector_norm(up, dim=0), torch.linalg.vector_norm(down, dim=1)
    products = sizes[0] * sizes[1]
    live = products > 1.01 * torch.finfo(torch.float32).eps * max(shape) * products[0]
    assert torch.allclose(sizes[0][live], sizes[1][live], rtol=1e-3)


def excess_free(weight: Tensor, rank: int) -> float:
    return torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt().item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_basis_is_orthonormal_and_its_values_are_the_largest(shape: tuple[int, int]) -> None:
    for dtype in (torch.float64, torch.float32):
        weight = with_spectrum(*shape, 0.5, dtype)
        basis, values = la.leading_directions(weight, 10)
        assert basis.dtype == values.dtype == dtype and basis.shape == (shape[0], 10)
        assert orthonormal(basis)
        assert torch.allclose(values.double(), torch.linalg.svdvals(weight.double())[:10], 1e-5)


Failure = Callable[[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor], tuple[Tensor, Tensor]]


def raises(_: object, __: Tensor) -> tuple[Tensor, Tensor]:
    raise torch.linalg.LinAlgError("did not converge")


def gives_nan(eigh: Callable[[Tensor], tuple[Tensor, Tensor]], matrix: Tensor):  # type: ignore[no-untyped-def]
    values, vectors = eigh(matrix)
    return values, vectors * math.nan


@pytest.mark.parametrize("failure", [raises, gives_nan])
@pytest.mark.parametrize("failing", [[torch.float32], [torch.float32, torch.float64]], ids=str)
def test_where_one_method_fails_the_next_is_taken(
    failing: list[torch.dtype], failure: Failure, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigh, tried = torch.linalg.eigh, []

    def sometimes(matrix: Tensor) -> tuple[Tensor, Tensor]:
        tried.append(matrix.dtype)
        return failure(eigh, matrix) if matrix.dtype in failing else eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", sometimes)
    weight = with_spectrum(30, 50, 0.5)
    down, up = svd.split(weight, 8)
    assert tried == [torch.float32, torch.float64]
    assert excess(weight, up @ down, 8) <= 1.00001


@pytest.mark.parametrize("failure", [raises, gives_nan])
def test_where_every_method_fails_the_weight_is_unfit(
    failure: Failure, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigh, exact = torch.linalg.eigh, torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: failure(eigh, m))

    def bad_svd(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = exact(matrix, full_matrices=full_matrices)
        return left, failure(lambda m: (values, m), matrix)[0] * math.nan, right

    monkeypatch.setattr(torch.linalg, "svd", bad_svd)
    with pytest.raises(UnfitWeightError, match=r"the SVD of a weight of shape \(3, 4\) failed: "):
        svd.split(normal(3, 4, dtype=torch.float32), 2)


def test_values_that_fp32_does_not_resolve_are_taken_in_fp64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eigh, tried = torch.linalg.eigh, []

    def watched(matrix: Tensor) -> tuple[Tensor, Tensor]:
        tried.append(matrix.dtype)
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    weight = with_spectrum(30, 50, 3.0)
    assert la.leading_directions(weight, 3)[0].dtype == torch.float32
    assert tried == [torch.float32]
    la.leading_directions(weight, 20)
    assert tried == [torch.float32, torch.float32, torch.float64]


def test_the_gram_matrix_in_blocks_is_its_lower_triangle() -> None:
    matrix = normal(150, 20)
    assert_close(la.gram(matrix).tril(), (matrix @ matrix.T).tril())


# Orthogonalization.


@pytest.mark.parametrize("method", [la.orthonormal, la.cholesky_qr2])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e7])
def test_bases_are_orthonormal_and_span_the_columns(
    method: Callable[[Tensor], Tensor], condition: float
) -> None:
    exact = torch.linalg.qr(normal(60, 10))[0] * torch.logspace(0, -math.log10(condition), 10)
    matrix = (exact.double() @ torch.linalg.qr(normal(10, 10))[0]).float()
    basis = method(matrix)
    assert orthonormal(basis)
    assert (matrix - basis @ (basis.T @ matrix)).norm() <= 1e-5 * matrix.norm()


@pytest.mark.parametrize("method", [la.orthonormal, la.cholesky_qr2])
def test_a_rank_deficient_matrix_has_an_orthonormal_basis_too(
    method: Callable[[Tensor], Tensor],
) -> None:
    matrix = normal(20, 3, dtype=torch.float32) @ normal(3, 6, dtype=torch.float32)
    assert orthonormal(method(matrix))
    assert orthonormal(method(torch.zeros(20, 6)))


# Warm starts.


def moved(weight: Tensor, drift: float, seed: int = 5) -> Tensor:
    noise = normal(*weight.shape, seed=seed, dtype=weight.dtype)
    return weight + noise * (drift * weight.norm() / noise.norm())


@pytest.mark.parametrize("drift", [0.0, 0.01, 0.05, 0.2, 5.0])
@pytest.mark.parametrize("power", [0.0, 0.03, 0.1, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("shape", [(96, 400), (100, 100), (300, 90)], ids=str)
def test_a_start_is_never_worse_than_none(
    shape: tuple[int, int], power: float, drift: float
) -> None:
    before, rank = with_spectrum(*shape, power), min(shape) // 4
    after = moved(before, drift)
    down, up = svd.split(after, rank, svd.split(before, rank))
    assert excess(after, up.double() @ down.double(), rank) <= OPTIMAL
    gram_up, gram_down = up.double().T @ up.double(), down.double() @ down.double().T
    assert (gram_up - gram_down).norm() <= 1e-3 * gram_up.norm()


def test_a_start_nearby_needs_no_decomposition_of_the_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = with_spectrum(90, 200, 0.5)
    start, sides, eigh = svd.split(before, 20), [], torch.linalg.eigh

    def watched(matrix: Tensor) -> tuple[Tensor, Tensor]:
        sides.append(len(matrix))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    svd.split(moved(before, 0.01), 20, start)
    svd.split(moved(before, 0.01), 10, start)
    assert sides == [20, 20]
    svd.split(moved(before, 3.0), 20, start)
    assert sides[-1] == 90


@pytest.mark.parametrize("turn", [False, True])
def test_a_start_may_have_trained_factors(turn: bool) -> None:
    """Not orthogonal, not balanced, more than needed."""
    weight = with_spectrum(60, 200, 0.5)
    weight = weight.T if turn else weight
    down, up = svd.split(weight, 30)
    mix = torch.eye(30) + 0.3 * normal(30, 30, seed=3, dtype=torch.float32)
    start = (torch.linalg.solve(mix, down) * 4, up @ mix)
    after = moved(weight, 0.01)
    new = svd.split(after, 20, start)
    assert excess(after, svd.join(new), 20) <= OPTIMAL


@pytest.mark.parametrize("bad", ["nan", "rank", "shape", "zeros", "noise"])
def test_a_start_that_is_none_is_ignored(bad: str) -> None:
    weight = with_spectrum(40, 100, 0.5)
    down, up = {
        "nan": (torch.full((10, 100), math.nan), torch.ones(40, 10)),
        "rank": (torch.ones(5, 100), torch.ones(40, 5)),
        "shape": (torch.ones(10, 99), torch.ones(40, 10)),
        "zeros": (torch.zeros(10, 100), torch.zeros(40, 10)),
        "noise": (normal(10, 100, dtype=torch.float32), normal(40, 10, dtype=torch.float32)),
    }[bad]
    assert excess(weight, svd.join(svd.split(weight, 10, (down, up))), 10) <= OPTIMAL


def test_subspace_iteration_converges_to_the_leading_directions() -> None:
    weight, noise = with_spectrum(50, 80, 1.0, torch.float64), normal(20, 80, seed=7)
    for steps, limit in [(1, 1.5), (4, 1.02), (30, 1 + 1e-9)]:
        basis, projected = subspace_iteration(weight, noise, steps, rank=10)
        assert basis.shape == (50, 10) and orthonormal(basis)
        assert_close(projected, basis.T @ weight)
        assert excess(weight, basis @ projected, 10) <= limit


def test_follow_refuses_what_is_far_away() -> None:
    weight = with_spectrum(50, 80, 0.5)
    assert follow(weight, normal(10, 80, dtype=torch.float32), 10) is None
    near = follow(weight, svd.split(weight, 10)[0], 10)
    assert near is not None and excess(weight, near[0] @ near[1], 10) <= 1.0001


# Recompression.


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(DTYPES[:2]),
    st.integers(0, 99),
    st.data(),
)
def test_refactor_is_split_of_join(
    n: int, m: int, old: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(n, m)))
    factors = (normal(old, m, seed=seed, dtype=dtype), normal(n, old, seed=seed + 1, dtype=dtype))
    down, up = svd.refactor(factors, rank)
    expected = Decomposition.refactor(svd, tuple(f.double() for f in factors), rank)
    joined, least = svd.join(factors).double(), svd.join(expected)
    assert down.shape == (rank, m) and up.shape == (n, rank) and up.dtype == dtype
    error = (joined - up.double() @ down.double()).norm() - (joined - least).norm()
    assert error <= TOLERANCE[dtype] * joined.norm()
    assert torch.linalg.vector_norm(up, dim=0).min() > 0 or (
        torch.linalg.vector_norm(down, dim=1).min() > 0
    )


@pytest.mark.parametrize("shape", [(12, 5, 3, 3), (30, 2, 2, 2), (9, 14)], ids=str)
def test_a_growing_rank_keeps_the_weight_and_adds_directions_that_can_learn(
    shape: tuple[int, ...],
) -> None:
    factors = svd.split(normal(*shape), 3)
    grown = svd.refactor(factors, 7)
    assert tuple(f.shape for f in grown) == svd.shapes(shape, 7)
    assert_close(svd.join(grown), svd.join(factors))
    cotangent = normal(*shape, seed=9)
    gradients = svd.pull(grown, cotangent)
    new = [g.flatten(1)[3:] if i == 0 else g.flatten(1)[:, 3:].T for i, g in enumerate(gradients)]
    assert (new[0].norm(dim=1) + new[1].norm(dim=1) > 1e-3).all()


def test_refactor_never_forms_the_weight() -> None:
    down, up = normal(4, 100_000), normal(100_000, 4)  # the weight would have 80 GB
    small = svd.refactor((down, up), 2)
    assert small[0].shape == (2, 100_000)
    with pytest.raises(UnfitWeightError):
        svd.refactor((down * math.nan, up), 2)


def test_grouped_factors_change_rank_group_by_group() -> None:
    grouped = Grouped(svd, 2)
    factors = grouped.split(normal(8, 3, 3, 3), 4)
    actual = grouped.join(grouped.refactor(factors, 2))
    expected = grouped.join(grouped.split(grouped.join(factors), 2))
    assert_close(actual, expected)


def test_refactor_leaves_the_graph_and_the_generator_alone() -> None:
    factors = normal(3, 8).requires_grad_(), normal(6, 3).requires_grad_()
    state = torch.get_rng_state()
    assert not any(f.requires_grad for f in svd.refactor(factors, 2))
    assert not any(f.requires_grad for f in svd.split(normal(3, 4).requires_grad_(), 2))
    assert torch.equal(torch.get_rng_state(), state)
