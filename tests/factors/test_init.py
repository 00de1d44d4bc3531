"""Factors start with the full layer's own statistics, and balancing keeps the weight."""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Sequence

import pytest
import torch
from laws import assert_close, randomize
from torch import Tensor, nn

import dynarank as dr
from dynarank.decompositions import Decomposition, Factors, Geometry, get_decomposition
from dynarank.factors.init import (
    balance,
    factors_of_variance,
    initialize_factors,
    plain_draw,
)
from dynarank.surgery.sites import Site, survey

LAYERS = {  # and the variance of their own initialization
    "linear": (lambda: nn.Linear(48, 40), 1 / (3 * 48)),
    "linear-no-bias": (lambda: nn.Linear(20, 60, bias=False), 1 / (3 * 20)),
    "conv": (lambda: nn.Conv2d(12, 24, 3), 1 / (3 * 12 * 9)),
    "grouped": (lambda: nn.Conv2d(24, 32, 3, groups=4), 1 / (3 * 6 * 9)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 24, 3, groups=2), 1 / (3 * 12 * 9)),
    "embedding": (lambda: nn.Embedding(50, 30), 1.0),
}


def low_rank(layer: str, rank: int = 4, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(LAYERS[layer][0]()).to(dtype)
    return dr.factorize(model, rank, layers="*")


def only(model: nn.Module) -> Site:
    return survey(model)[0]


def groups_of(site: Site) -> list[Factors]:
    groups = site.spec.geometry.groups
    return list(zip(*[f.chunk(groups) for f in site.factors()], strict=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_variance_is_that_of_the_full_layer(layer: str) -> None:
    model, expected = low_rank(layer), LAYERS[layer][1]
    squares, ratios = [], []
    for seed in range(8):
        assert initialize_factors(model, seed=seed) == ["0"]
        squares.append(only(model).effective().square().mean().item())
        down, up = only(model).factors()
        assert_close(down.norm(), up.norm())
        ratios.append((up.square().sum() / down.square().sum()).item())
    mean, spread = statistics.mean(squares), statistics.stdev(squares)
    assert abs(mean / expected - 1) < 0.02, mean / expected
    assert 0 < spread / expected < 0.05  # a new draw for each seed


@pytest.mark.parametrize("layer", LAYERS)
def test_the_variance_is_met_exactly_given_the_target(layer: str) -> None:
    site = only(low_rank(layer))
    decomposition = site.spec.decomposition(site.form)
    generator = torch.Generator().manual_seed(3)
    factors = factors_of_variance(decomposition, site.shape, 3, 0.37, generator)
    assert_close(
        decomposition.join(factors).square().mean(), torch.tensor(0.37, dtype=torch.float64)
    )


def test_factors_are_balanced_in_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    down_gram, up_gram = torch.zeros(2, 3, 3, dtype=torch.float64)
    for _ in range(300):
        down, up = factors_of_variance(get_decomposition("svd"), (30, 50), 3, 1.0, generator)
        down_gram += down @ down.T / 300
        up_gram += up.T @ up / 300
    assert (down_gram - up_gram).norm() / up_gram.norm() < 0.03


@pytest.mark.parametrize("layer", LAYERS)
def test_spectrum_is_the_leading_part_of_a_draw(layer: str) -> None:
    model = low_rank(layer)
    initialize_factors(model, match="spectrum", seed=5)
    site = only(model)
    draw = next(plain_draw(site, (5 ^ zlib.crc32(b"0")) % 2**63))
    groups = site.spec.geometry.groups
    pairs = zip(site.effective().chunk(groups), draw.chunk(groups), strict=True)
    for (weight, full), (down, up) in zip(pairs, groups_of(site), strict=True):
        values = torch.linalg.svdvals(full.flatten(1))[:4]
        assert_close(torch.linalg.svdvals(weight.flatten(1))[:4], values)
        assert_close(up.flatten(1).T @ up.flatten(1), torch.diag(values), 1e-11)
        assert_close(down.flatten(1) @ down.flatten(1).T, torch.diag(values), 1e-11)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_plain_draw_is_what_the_plain_layer_draws(layer: str) -> None:
    model = low_rank(layer)
    draws = plain_draw(only(model), 11)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        plain = LAYERS[layer][0]().double()
        plain.reset_parameters()  # in fp64, from a state that __init__ has not moved
        torch.manual_seed(11)
        plain.reset_parameters()
        first = plain.weight.detach().clone()
        plain.reset_parameters()
    spec = only(model).spec
    assert torch.equal(next(draws), spec.to_canonical(first))
    assert torch.equal(next(draws), spec.to_canonical(plain.weight))


@pytest.mark.parametrize("match", ["variance", "spectrum"])
def test_it_touches_nothing_else(match: str) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)).bfloat16()
    dr.factorize(model, {"0": 3, "1": 3})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = {n: id(p) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert initialize_factors(model, match=match, seed=1) == ["0", "1"]
    assert torch.equal(state, torch.get_rng_state())
    for name, p in model.named_parameters():
        changed = name.endswith(("down", "up"))
        assert torch.equal(p, before[name]) != changed and id(p) == ids[name]
        assert p.dtype == torch.bfloat16
    assert not torch.equal(model[0].down, model[1].down)
    again = {n: p.detach().clone() for n, p in model.named_parameters()}
    initialize_factors(model, match=match, seed=1)
    assert all(torch.equal(p, again[n]) for n, p in model.named_parameters())
    assert initialize_factors(model, layers="1") == ["1"]
    assert (
        model[0].form == dr.LowRank(3) and model[0](torch.ones(2, 12).bfloat16()).isfinite().all()
    )


def test_another_reset_and_errors() -> None:
    model = low_rank("linear")
    initialize_factors(model, reset=lambda m: nn.init.normal_(m.weight, std=0.02))
    assert abs(model[0].weight.std().item() / 0.02 - 1) < 0.02
    with pytest.raises(ValueError, match="variance"):
        initialize_factors(model, match="rank")
    with pytest.raises(ValueError, match="factorize them first"):
        initialize_factors(nn.Sequential(nn.Linear(4, 4)))
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    gpt = dr.factorize(nn.Sequential(conv1d(24, 16)), 3)
    with pytest.raises(ValueError, match="reset="):
        initialize_factors(gpt)
    initialize_factors(gpt, reset=lambda m: nn.init.normal_(m.weight, std=0.02))
    assert math.isclose(gpt[0].weight.std().item(), 0.02, rel_tol=0.05)


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
    factors = factors_of_variance(Chain(), (20, 30), 5, 0.5, generator)
    assert_close(Chain().join(factors).square().mean(), torch.tensor(0.5).double())
    uneven = (factors[0] * 9, factors[1], factors[2] / 4)
    even = Chain().balanced(uneven)
    assert_close(Chain().join(even), Chain().join(uneven))
    for factor in even[1:]:
        assert_close(factor.norm(), even[0].norm())
    zero = (factors[0], factors[1] * 0, factors[2])
    assert Chain().balanced(zero) == zero
