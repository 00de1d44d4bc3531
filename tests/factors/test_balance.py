"""Balancing keeps the weight."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from laws import assert_close, randomize
from torch import Tensor, nn

import dynarank as dr
from dynarank.decompositions import Decomposition, Factors, Geometry
from dynarank.factors.balance import balance
from dynarank.surgery.sites import Site, survey

LAYERS = {
    "linear": lambda: nn.Linear(48, 40),
    "linear-no-bias": lambda: nn.Linear(20, 60, bias=False),
    "conv": lambda: nn.Conv2d(12, 24, 3),
    "grouped": lambda: nn.Conv2d(24, 32, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(16, 24, 3, groups=2),
    "embedding": lambda: nn.Embedding(50, 30),
}


def low_rank(layer: str) -> nn.Sequential:
    return dr.factorize(nn.Sequential(LAYERS[layer]()).double(), 4, layers="*")


def only(model: nn.Module) -> Site:
    return survey(model)[0]


def groups_of(site: Site) -> list[Factors]:
    groups = site.spec.geometry.groups
    return list(zip(*[f.chunk(groups) for f in site.factors()], strict=True))


@pytest.mark.parametrize("form", [dr.LowRank(4), dr.Adapted(4)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_balance_keeps_the_weight(layer: str, form: dr.forms.Form) -> None:
    model = low_rank(layer)
    dr.apply_plan(model, {"0": form})
    randomize(model)
    with torch.no_grad():
        only(model).factors()[0].mul_(30)
    before = only(model).effective().detach().clone()
    assert balance(model) == ["0"]
    assert_close(only(model).effective().detach(), before)
    for down, up in groups_of(only(model)):
        gram = down.flatten(1) @ down.flatten(1).T
        assert_close(up.flatten(1).T @ up.flatten(1), gram, 1e-11)
        assert_close(torch.diag(gram.diag()), gram, 1e-11)


def test_a_zero_adapter_can_still_learn() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).double()
    dr.deflate(model, rank=3, layers="*")
    balance(model)
    down, up = only(model).factors()
    assert not (up @ down).abs().max() > 1e-15
    assert bool(up.abs().sum(0).min() > 0.1)


class Chain(Decomposition):
    """Three matrices, for what the base class does with any chain."""

    name = "chain"

    def limit(self, shape: Sequence[int]) -> int:
        return min(shape)

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        return (rank, shape[1]), (rank, rank), (shape[0], rank)

    def split(self, weight: Tensor, rank: int) -> Factors:
        raise NotImplementedError

    def join(self, factors: Factors) -> Tensor:
        return factors[2] @ factors[1] @ factors[0]

    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        return (geometry,) * 3


def test_other_chains() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = Chain().shapes((20, 30), 5)
    factors = tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    uneven = (factors[0] * 9, factors[1], factors[2] / 4)
    even = Chain().balanced(uneven)
    assert_close(Chain().join(even), Chain().join(uneven))
    for factor in even[1:]:
        assert_close(factor.norm(), even[0].norm())
    zero = (factors[0], factors[1] * 0, factors[2])
    assert Chain().balanced(zero) == zero
