"""Laws 1 and 2 and the lifts, of each decomposition by itself: pure tensor functions."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from covering import over
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import DTYPES, assert_close
from torch import Tensor

from dynarank.decompositions import (
    Decomposition,
    Geometry,
    UnfitWeightError,
    decomposition_names,
    get_decomposition,
)
from dynarank.decompositions.geometry import apply, linear_map
from dynarank.decompositions.grouped import Grouped
from dynarank.decompositions.numerics import als

F32, F64 = torch.float32, torch.float64
NEW = ["tucker", "cp", "separable"]
SHAPES = [
    (7, 5),
    (10, 6, 3),
    (8, 6, 3, 2),
    (9, 1, 3, 3),
    (1, 9, 3, 3),
    (6, 5, 2, 3, 2),
    (6, 8, 1, 1),
]
SMALL = [(6, 5), (6, 5, 3), (6, 5, 3, 2), (4, 3, 2, 2, 2)]

over_names = pytest.mark.parametrize("name", NEW)
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def decaying(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A weight with a falling spectrum in every mode, as trained ones have."""
    weight = normal(*shape, seed=seed)
    for mode, size in enumerate(shape):
        basis = torch.linalg.qr(normal(size, size, seed=seed + 1 + mode))[0]
        weight = (weight.movedim(mode, -1) @ (basis / torch.arange(1.0, size + 1))).movedim(
            -1, mode
        )
    return weight


def random_factors(decomposition: Decomposition, shape: tuple[int, ...], rank: int) -> list[Tensor]:
    shapes = decomposition.shapes(shape, rank)
    return [normal(*s, seed=i) / math.sqrt(s[1]) for i, s in enumerate(shapes)]


def error(decomposition: Decomposition, weight: Tensor, rank: int) -> float:
    joined = decomposition.join(decomposition.split(weight, rank))
    return ((joined - weight).norm() / weight.norm()).item()


# Law 1: split and join.


def test_they_are_known_by_name() -> None:
    assert decomposition_names()[:4] == ("svd", "tucker", "cp", "separable")


@over({"name": NEW, "shape": SHAPES, "dtype": DTYPES, "groups": [1, 2]})
def test_exact_at_the_limit(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, groups: int
) -> None:
    decomposition = get_decomposition(name, groups)
    weight = normal(shape[0] * groups, *shape[1:], dtype=dtype)
    limit = decomposition.limit(weight.shape)
    factors = decomposition.split(weight, limit)
    assert tuple(tuple(f.shape) for f in factors) == decomposition.shapes(weight.shape, limit)
    assert len(factors) == len(decomposition.factor_names(len(shape) - 2))
    assert_close(decomposition.join(tuple(f.to(dtype) for f in factors)), weight)


@pytest.mark.parametrize("name", ["tucker", "separable"])
@over_shapes
def test_the_limit_is_the_least_exact_rank(name: str, shape: tuple[int, ...]) -> None:
    decomposition = get_decomposition(name)
    limit = decomposition.limit(shape)
    assert error(decomposition, normal(*shape), limit - 1) > 1e-3 or limit == 1


@over_names
@pytest.mark.parametrize("shape", [(7, 5, 3), (6, 4, 3, 2), (9, 1, 3, 3)], ids=str)
@pytest.mark.slow
def test_more_rank_less_error(name: str, shape: tuple[int, ...]) -> None:
    """CP is fitted down to 1e-7 of W, and there generic weights are before the limit."""
    decomposition = get_decomposition(name)
    limit = decomposition.limit(shape)
    ranks = sorted({max(1, limit * i // 8) for i in (1, 3, 8)})
    errors = [error(decomposition, decaying(shape), rank) for rank in ranks]
    assert all(more >= less - 1e-6 for more, less in itertools.pairwise(errors))
    assert errors[0] > errors[-1]


def test_what_the_ranks_and_the_chain_are() -> None:
    shape = (64, 32, 3, 5)
    tucker, cp, separable = map(get_decomposition, NEW)
    assert tucker.shapes(shape, 48) == ((32, 32, 1, 1), (48, 32, 3, 5), (64, 48, 1, 1))
    assert cp.shapes(shape, 48) == ((48, 32, 1, 1), (48, 1, 3, 1), (48, 1, 1, 5), (64, 48, 1, 1))
    chain = ((32, 32, 1, 1), (96, 32, 3, 1), (64, 96, 1, 5), (64, 64, 1, 1))
    assert separable.shapes(shape, 99) == chain
    assert [d.limit(shape) for d in (tucker, cp, separable)] == [64, 480, 96]
    assert separable.factor_names(3) == ("down", "depth", "height", "width", "up")


# Against tensorly.


def peer_error(name: str, weight: Tensor, rank: int) -> float:
    tensorly = pytest.importorskip("tensorly")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorly.decomposition import parafac, partial_tucker, tensor_train

        before = tensorly.get_backend()
        tensorly.set_backend("pytorch")
        try:
            if name == "tucker":
                ranks = [min(rank, size) for size in weight.shape[:2]]
                tucker, _ = partial_tucker(weight, ranks, modes=[0, 1], n_iter_max=200, tol=1e-8)
                joined = tensorly.tenalg.multi_mode_dot(*tucker, modes=[0, 1])
            elif name == "cp":
                settings = {"n_iter_max": 100, "tol": 1e-8, "random_state": 0}
                fits = [
                    parafac(weight, rank, init="svd", normalize_factors=n, **settings)
                    for n in (True, False)
                ]
                return min(relative(tensorly.cp_to_tensor(fit), weight) for fit in fits)
            else:
                shapes = get_decomposition(name).shapes(weight.shape, rank)
                bonds = [1, *(shape[0] for shape in shapes[:-1]), 1]
                train = tensor_train(weight.movedim(0, -1), bonds)
                joined = tensorly.tt_to_tensor(train).movedim(-1, 0)
        finally:
            tensorly.set_backend(before)
    return relative(joined, weight)


def relative(joined: Tensor, weight: Tensor) -> float:
    return ((joined - weight).norm() / weight.norm()).item()


LARGER = [
    ((16, 12, 3, 3), 6), ((24, 16, 5), 6), ((10, 6, 3, 3), 5), ((6, 5, 2, 3, 2), 4),
    ((32, 32, 3, 3), 8),
]  # fmt: skip


@over({"name": NEW, "kind": [normal, decaying], "shape, rank": LARGER})
@pytest.mark.slow
def test_no_worse_than_tensorly(name: str, kind: object, shape: tuple[int, ...], rank: int) -> None:
    weight = normal(*shape) if kind is normal else decaying(shape)
    ours = error(get_decomposition(name), weight, rank)
    assert ours <= 1.001 * peer_error(name, weight, rank)


# Law 2: the chain applied is the joined weight applied.


def geometries(dims: int) -> Iterator[Geometry]:
    strided = Geometry((2, 1, 3)[:dims], (1, 0, 2)[:dims], (1, 2, 1)[:dims])
    yield strided
    yield Geometry((2,) * dims, (1,) * dims, (1,) * dims)
    yield Geometry((1,) * dims, (2,) * dims, (2,) * dims)
    for output_padding in [(0, 0, 0), (1, 0, 2)]:
        yield Geometry(
            strided.stride,
            strided.padding,
            strided.dilation,
            output_padding[:dims],
            transposed=True,
        )


CASES = [(dims, g) for dims in (1, 2, 3) for g in geometries(dims)]


@over({"name": NEW, "groups": [1, 2], "dims, geometry": CASES})
def test_the_chain_is_the_joined_weight(
    name: str, groups: int, dims: int, geometry: Geometry
) -> None:
    """Values and the gradients of input, factors and bias."""
    decomposition = get_decomposition(name, groups)
    geometry = Geometry(**{**geometry.__dict__, "groups": groups})
    shape = (4 * groups, 3, *(3, 2, 3)[:dims])
    rank = 2
    factors = [f.requires_grad_() for f in random_factors(decomposition, shape, rank)]
    x = normal(2, 3 * groups, *(8, 7, 9)[:dims], seed=9).requires_grad_()
    bias = normal(shape[0], seed=8).requires_grad_()
    stages = decomposition.stages(geometry, rank)
    chained = apply(x, tuple(factors), stages, bias)
    joined = linear_map(x, decomposition.join(tuple(factors)), geometry, bias)
    assert_close(chained, joined)
    seen = [x, bias, *factors]
    toward = normal(*joined.shape, seed=7)
    of_chain = torch.autograd.grad(chained, seen, toward)
    for actual, expected in zip(of_chain, torch.autograd.grad(joined, seen, toward), strict=True):
        assert_close(actual, expected)


@over_names
def test_the_chain_of_a_linear(name: str) -> None:
    decomposition = get_decomposition(name)
    factors = tuple(random_factors(decomposition, (7, 5), 3))
    x = normal(2, 4, 5, seed=9)
    stages = decomposition.stages(Geometry(), 3)
    assert_close(apply(x, factors, stages), x @ decomposition.join(factors).T)


# The derivative and its inverse.


def derivative(decomposition: Decomposition, factors: tuple[Tensor, ...]) -> Tensor:
    """J (entries of W, entries of all factors), a column at a time."""
    parts = torch.func.jacrev(lambda *f: decomposition.join(f), tuple(range(len(factors))))(
        *factors
    )
    size = decomposition.join(factors).numel()
    return torch.cat([part.reshape(size, -1) for part in parts], 1)


@over({"name": NEW, "groups": [1, 2], "shape": SMALL})
def test_pull_and_lift_against_dense_algebra(
    name: str, groups: int, shape: tuple[int, ...]
) -> None:
    """Also for cotangents that no M has, as averages of gradients at moving factors are."""
    decomposition = get_decomposition(name, groups)
    shape = (shape[0] * groups, *shape[1:])
    factors = tuple(random_factors(decomposition, shape, 2))
    jacobian = derivative(decomposition, factors)
    gradient = normal(*shape, seed=5)
    pulled = decomposition.pull(factors, gradient)
    flat = torch.cat([p.flatten() for p in pulled])
    assert_close(flat, jacobian.T @ gradient.flatten())
    least = torch.linalg.lstsq(jacobian.T, flat[:, None], driver="gelsd").solution
    assert_close(decomposition.lift(factors, pulled).flatten(), least[:, 0], 1e-9)
    back = decomposition.pull(factors, decomposition.lift(factors, pulled))
    for actual, expected in zip(back, pulled, strict=True):
        assert_close(actual, expected, 1e-10)
    if len(factors) == 2 or name == "tucker":
        return  # lifts in closed form, which have their own way with what does not fit together
    wild = tuple(normal(*p.shape, seed=i + 20) for i, p in enumerate(pulled))
    flat = torch.cat([p.flatten() for p in wild])
    least = torch.linalg.lstsq(jacobian.T, flat[:, None], driver="gelsd").solution
    assert_close(decomposition.lift(factors, wild).flatten(), least[:, 0], 1e-9)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("fresh", [True, False])
def test_the_general_lift_is_the_svds_for_a_pair(shape: tuple[int, ...], fresh: bool) -> None:
    svd = get_decomposition("svd")
    down, up = random_factors(svd, shape, 3)
    factors = down, up * (not fresh)
    pulled = svd.pull(factors, normal(*shape, seed=5))
    assert_close(Decomposition.lift(svd, factors, pulled), svd.lift(factors, pulled), 1e-10)


@over_names
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_zero_factor_breaks_no_lift(name: str, shape: tuple[int, ...]) -> None:
    """A fresh adapter's: one factor zero, or all."""
    decomposition = get_decomposition(name)
    whole = random_factors(decomposition, shape, 2)
    for zeros in [{i} for i in range(len(whole))] + [set(range(len(whole)))]:
        factors = tuple(f * (i not in zeros) for i, f in enumerate(whole))
        pulled = decomposition.pull(factors, normal(*shape, seed=5))
        lifted = decomposition.lift(factors, pulled)
        for actual, expected in zip(decomposition.pull(factors, lifted), pulled, strict=True):
            assert (actual - expected).norm() <= 1e-10
        squares = decomposition.lift_squares(factors, tuple(p.square() for p in pulled))
        assert squares.shape == shape
        assert squares.isfinite().all() and (squares >= 0).all()
        assert squares.any() == any(p.any() for p in pulled)


@over({"name": NEW, "groups": [1, 2], "shape": SMALL})
def test_squares_of_even_gradients_lift_to_their_scale(
    name: str, groups: int, shape: tuple[int, ...]
) -> None:
    """From E[pull(M)^2] itself to a constant; from a mean of 2000 draws nearly so."""
    decomposition = get_decomposition(name, groups)
    shape = (shape[0] * groups, *shape[1:])
    factors = tuple(random_factors(decomposition, shape, 2))
    energy = derivative(decomposition, factors).square().sum(0)
    parts = energy.split([f.numel() for f in factors])
    expected = tuple(0.04 * p.reshape(f.shape) for p, f in zip(parts, factors, strict=True))
    constant = torch.full(shape, 0.04, dtype=F64)
    assert_close(decomposition.lift_squares(factors, expected), constant)
    draws = 0.2 * normal(2000, *shape, seed=3)
    pulled = torch.func.vmap(lambda m: decomposition.pull(factors, m))(draws)
    means = tuple(p.square().mean(0) for p in pulled)
    assert_close(decomposition.lift_squares(factors, means), constant, 0.1)


def test_squares_follow_outputs_inputs_and_positions() -> None:
    for name in NEW:
        decomposition = get_decomposition(name)
        shape = (6, 5, 3, 2)
        profiles = [torch.arange(1.0, n + 1, dtype=F64) for n in shape]
        product = functools.reduce(lambda a, b: a[..., None] * b, profiles)
        factors = tuple(f.sign() for f in random_factors(decomposition, shape, 3))
        jacobian = derivative(decomposition, factors)
        squares = (jacobian.square().T @ product.flatten()).split([f.numel() for f in factors])
        shaped = tuple(s.reshape(f.shape) for s, f in zip(squares, factors, strict=True))
        assert_close(decomposition.lift_squares(factors, shaped), product, 0.35)


# What may go wrong.


def can_learn(decomposition: Decomposition, factors: tuple[Tensor, ...], seed: int) -> None:
    """Finite, and every component of the chain has a gradient in one of its factors at least."""
    assert all(f.isfinite().all() for f in factors)
    gradient = normal(*decomposition.join(factors).shape, seed=seed)
    assert any(p.norm() > 0 for p in decomposition.pull(factors, gradient))


@over_names
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_poor_weights_give_factors_that_learn(name: str, data: st.DataObject) -> None:
    """Zero, or of low rank, or with dead channels; tiny, ordinary or huge."""
    decomposition = get_decomposition(name)
    dims = data.draw(st.integers(0, 3))
    shape = tuple(data.draw(st.integers(1, 5)) for _ in range(2 + dims))
    rank = data.draw(st.integers(1, decomposition.limit(shape)))
    live = data.draw(st.sampled_from([0, 1, 2]))
    scale = data.draw(st.sampled_from([1e-18, 1.0, 1e18]))
    terms = [
        functools.reduce(
            lambda a, b: a[..., None] * b,
            [normal(size, seed=10 * c + mode) for mode, size in enumerate(shape)],
        )
        for c in range(live)
    ]
    weight = scale * torch.stack(terms).sum(0) if terms else torch.zeros(shape, dtype=F64)
    weight[0] *= data.draw(st.sampled_from([0.0, 1.0]))
    weight = weight.to(data.draw(st.sampled_from([F64, F32])))
    factors = tuple(f.double() for f in decomposition.split(weight, rank))
    can_learn(decomposition, factors, seed=4)
    left = (decomposition.join(factors) - weight).norm()
    assert left <= (1 + 1e-6) * weight.norm()
    if rank >= live and name != "separable":
        assert left <= 1e-3 * weight.norm()


@over_names
def test_of_a_zero_weight_every_component_can_learn(name: str) -> None:
    decomposition = get_decomposition(name)
    factors = decomposition.split(torch.zeros(6, 5, 3, 3), 4)
    zero = [i for i, f in enumerate(factors) if not f.any()]
    assert len(zero) == 1
    (pulled,) = [decomposition.pull(factors, normal(6, 5, 3, 3))[i] for i in zero]
    assert (pulled != 0).all()


@over_names
def test_factors_are_of_one_size(name: str) -> None:
    decomposition = get_decomposition(name)
    factors = decomposition.split(normal(8, 6, 3, 3), 4)
    norms = torch.stack([f.norm() for f in factors])
    assert_close(norms, norms[:1].expand_as(norms))
    if name == "cp":
        down, height, width, up = factors
        sizes = [f.flatten(1).norm(dim=1) for f in (down, height, width)]
        assert_close(torch.stack(sizes), up.flatten(1).norm(dim=0).expand(3, -1))


@over_names
def test_the_same_weight_gives_the_same_factors(name: str) -> None:
    decomposition = get_decomposition(name)
    weight = normal(8, 6, 3, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = decomposition.split(weight, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, decomposition.split(weight, 4)))


@over_names
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_unfit(name: str, bad: float) -> None:
    weight = normal(6, 5, 3, 3)
    weight[1, 2, 0, 1] = bad
    with pytest.raises(UnfitWeightError, match=r"shape \(6, 5, 3, 3\)"):
        get_decomposition(name).split(weight, 3)


@pytest.mark.slow
def test_cp_of_a_tensor_without_a_best_one_stays_bounded() -> None:
    """a a b + a b a + b a a has rank 3 and comes as near as one likes to rank 2, with components
    that grow without bound while they cancel (de Silva and Lim, 2008)."""
    a, b = torch.eye(4, dtype=F64)[:2]
    terms = [(a, a, b), (a, b, a), (b, a, a)]
    weight = sum(torch.einsum("i,j,k->ijk", *term) for term in terms)
    assert isinstance(weight, Tensor)
    cp = get_decomposition("cp")
    down, width, up = cp.split(weight, 2)
    sizes = down.flatten(1).norm(dim=1) * width.flatten(1).norm(dim=1) * up.flatten(1).norm(dim=0)
    assert sizes.max() <= als.BOUND * weight.norm()
    assert 1e-6 < error(cp, weight, 2) < 0.5


@pytest.mark.parametrize("left", [math.nan, math.inf, 1e9])
def test_cp_falls_back_to_the_best_iterate(left: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps that diverge from the third on: what the second gave is the result."""
    weight = normal(6, 5, 3)
    real, calls = als._sweep, list[tuple[tuple[Tensor, ...], float]]()

    def diverging(*arguments: object) -> tuple[tuple[Tensor, ...], float]:
        swept, error = real(*arguments)  # type: ignore[arg-type]
        calls.append((swept, error))
        if len(calls) < 3:
            return swept, error
        return tuple(f * math.nan for f in swept), left

    monkeypatch.setattr(als, "_sweep", diverging)
    monkeypatch.setattr(als, "FEW", 0)
    factors = als.fit(weight, 3, True)
    assert all(map(torch.equal, factors, calls[1][0]))
    assert len(calls) == 4  # the third, and once more without momentum


def test_grouped_splits_each_group_by_itself() -> None:
    weight = normal(12, 5, 3)
    for name in NEW:
        inner = get_decomposition(name)
        joined = Grouped(inner, 2).join(Grouped(inner, 2).split(weight, 2))
        each = [inner.join(inner.split(w, 2)) for w in weight.chunk(2)]
        assert_close(joined, torch.cat(each))
