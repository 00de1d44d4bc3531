"""A larger rank: the same function, and directions that training can use."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from covering import over
from laws import DTYPES, LAYER_AND_DECOMPOSITION, LayerCase, assert_close, randomize
from torch import Tensor, nn

import dynarank as dr
from dynarank import LowRank
from dynarank.surgery.sites import Site, survey

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's
F64 = torch.float64
over_pairs = pytest.mark.parametrize(("case", "decomposition"), LAYER_AND_DECOMPOSITION, ids=str)


def small(
    case: LayerCase, decomposition: str, dtype: torch.dtype, low: int
) -> tuple[nn.Module, Tensor, int]:
    """The layer at rank ``low`` with drawn factors, an input, and a larger rank."""
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).to(dtype)
    limit = only(model).spec.decomposition(LowRank(1, decomposition)).limit(only(model).shape)
    if limit <= low:
        pytest.skip("the layer's limit leaves nothing to grow")
    dr.apply_plan(model, {"0": LowRank(low, decomposition)})
    randomize(model)
    return model, torch.randn(case.shape, dtype=dtype), min(low + 3, limit)


def only(model: nn.Module) -> Site:
    (site,) = survey(model)
    return site


def ranks(model: nn.Module) -> list[int]:
    """Of each group's weight the ranks of its unfoldings into matrices, summed."""
    site = only(model)
    found: list[int] = []
    for weight in site.effective().detach().chunk(site.spec.geometry.groups):
        modes, dims = range(weight.ndim), weight.ndim
        sides = [side for size in range(1, dims) for side in combinations(modes, size)]
        unfoldings = [
            weight.movedim(side, tuple(range(len(side)))).flatten(len(side)).flatten(0, -2)
            for side in sides
        ]
        found.append(sum(int(torch.linalg.matrix_rank(one, rtol=1e-7)) for one in unfoldings))
    return found


def train(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        y = model(x)
        (y * torch.randn_like(y)).sum().backward()
        optimizer.step()


@over({"case, decomposition": LAYER_AND_DECOMPOSITION, "dtype": DTYPES})
def test_growing_keeps_the_function(
    case: LayerCase, decomposition: str, dtype: torch.dtype
) -> None:
    model, x, high = small(case, decomposition, dtype, 2)
    expected = model(x)
    (change,) = dr.apply_plan(model, {"0": LowRank(high, decomposition)})
    assert_close(model(x), expected)
    assert change.error < (1e-13 if dtype == F64 else 1e-6)


@over_pairs
def test_every_new_direction_gets_a_gradient_at_once(case: LayerCase, decomposition: str) -> None:
    """Of each direction at least one factor: a pair of zeros could never learn."""
    model, x, high = small(case, decomposition, F64, 2)
    dr.apply_plan(model, {"0": LowRank(high, decomposition)})
    y = model(x)
    (y * torch.randn_like(y)).sum().backward()
    site, groups = only(model), only(model).spec.geometry.groups
    first, *_, last = (p.grad for p in site.factors())
    assert isinstance(first, Tensor) and isinstance(last, Tensor)
    if decomposition in ("tucker", "separable") and len(site.factors()) > 2:
        assert first.any() and last.any()  # their directions are not one to one
        return
    down = first.flatten(1).norm(dim=1).reshape(groups, -1)  # (groups, r)
    up = last.flatten(1).reshape(groups, -1, high).norm(dim=1)
    assert ((down + up) > 1e-9 * (down + up).max()).all()


@over_pairs
def test_a_step_or_two_make_the_weight_of_a_larger_rank(
    case: LayerCase, decomposition: str
) -> None:
    model, x, high = small(case, decomposition, F64, 2)
    before = ranks(model)
    dr.apply_plan(model, {"0": LowRank(high, decomposition)})
    train(model, x, torch.optim.SGD(model.parameters(), lr=1e-3), 2)
    grown = [one > two for one, two in zip(ranks(model), before, strict=True)]
    assert all(grown)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_pair_grows_to_the_whole_rank_with_its_optimizer(kind: type) -> None:
    """Three growths of an SVD pair under momentum: 2, 4, 7 of 7 directions, all of them live."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9, bias=False)).double()
    dr.apply_plan(model, {"0": LowRank(2)})
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    x = torch.randn(20, 7, dtype=F64)
    for rank in (4, 7):
        train(model, x, optimizer, 3)
        expected = model(x)
        dr.apply_plan(model, {"0": LowRank(rank)}, optimizer=optimizer)
        assert_close(model(x), expected)
        train(model, x, optimizer, 3)
        assert ranks(model) == [2 * rank]  # a matrix has two unfoldings
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
            id(p) for p in model.parameters()
        }


def test_what_the_optimizer_knew_survives_growth() -> None:
    """The moment of W that the factors stand for is the same before and after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9, bias=False)).double()
    dr.apply_plan(model, {"0": LowRank(2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    train(model, torch.randn(20, 7, dtype=F64), optimizer, 3)
    before = lifted(model, optimizer)
    dr.apply_plan(model, {"0": LowRank(5)}, optimizer=optimizer)
    # What the new directions add to the tangent space, the old factors never saw.
    assert_close(lifted(model, optimizer), before, 1e-6)


def lifted(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    site = only(model)
    moments = tuple(optimizer.state[p]["momentum_buffer"] for p in site.factors())
    factors = tuple(p.detach() for p in site.factors())
    return site.spec.decomposition(LowRank(2)).lift(factors, moments)
