"""Activation-aware truncation has the least error there is, and solves each problem once."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from laws import assert_close
from torch import Tensor, nn

import dynarank as dr
from dynarank.decompositions.numerics.principal import principal_of_inputs
from dynarank.decompositions.svd import SVD
from dynarank.decompositions.truncation import (
    ActivationStats,
    output_energies,
    project,
    split_activation_aware,
)

SHAPES = [(96, 64), (64, 96), (200, 40), (130, 130), (24, 8, 3, 3)]
SPECTRA = {"flat": 0.0, "slow": -0.5, "falling": -1.5, "steep": -3.0}


def problem(shape: tuple[int, ...], power: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight in fp32 and inputs with a spectrum of this power law, with a factor of 1e4."""
    torch.manual_seed(seed)
    m = torch.Size(shape[1:]).numel()
    turn = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0]
    x = torch.randn(3000, m, dtype=torch.float64) * torch.arange(1.0, m + 1) ** power
    return torch.randn(shape), (x @ turn).float()


def statistics(side: str, weight: Tensor, x: Tensor) -> ActivationStats:
    """As they are measured: fp32 products, summed."""
    seen = x if side == "input" else x @ weight.flatten(1).T
    return ActivationStats(side, (seen.T @ seen).double()[None] / len(x), len(x))  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("power", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_fp32_the_output_error_is_the_least_there_is(
    shape: tuple[int, ...], power: float, side: str
) -> None:
    """Against the singular values of the outputs in fp64; rounding is what the data has of it."""
    weight, x = problem(shape, power)
    y = x.double() @ weight.double().flatten(1).T
    values = torch.linalg.svdvals(y).square()
    activity, svd = statistics(side, weight, x), SVD()
    for rank in (1, 5, min(y.shape[1], x.shape[1]) // 4, min(y.shape[1], x.shape[1]) // 2):
        factors, _ = split_activation_aware(svd, weight, rank, activity)
        cut = svd.join(factors).flatten(1).double()
        left = (y - x.double() @ cut.T).square().sum()
        noise = 1e-6 * values.sum()
        assert left <= 1.002 * values[rank:].sum() + noise
        assert_close(cut, project(weight, rank, activity)[0].flatten(1).double(), 1e-4)
        down, up = (factor.flatten(1) for factor in factors)
        assert_close(up.T @ up, down @ down.T, 1e-4)
    energies = output_energies(weight, activity)[0] * len(x)
    assert_close(energies, values[: len(energies)], 1e-5)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_sizes_of_weights_and_inputs_do_not_matter(scale: float) -> None:
    weight, x = problem((40, 24), -1.0)
    expected = project(weight, 6, statistics("input", weight, x))[0]
    activity = statistics("input", weight, x)
    large = ActivationStats("input", activity.second * scale**2, activity.count)
    assert_close(project(weight * scale, 6, large)[0] / scale, expected, 1e-4)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of the eigenproblems that are solved."""
    sizes: list[int] = []
    eigh = torch.linalg.eigh

    def counted(matrix: Tensor, *rest: object) -> object:
        sizes.append(matrix.shape[-1])
        return eigh(matrix, *rest)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    yield sizes


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48), nn.Tanh(),
        nn.Unflatten(1, (3, 16)), nn.Conv1d(3, 36, 3, groups=3), nn.Flatten(),
        nn.Linear(36 * 14, 4),
    )  # fmt: skip
    return model, torch.randn(256, 32)


@pytest.mark.parametrize("low", [False, True])
def test_a_plan_and_its_cut_solve_each_problem_once(low: bool, solved: list[int]) -> None:
    model, x = network()
    chosen = ["0", "2", "4", "7"]
    if low:  # from low-rank to less
        dr.factorize(model, 0.8, layers=chosen)
    calibration = dr.calibrate(model, [x])
    del solved[:]
    plan = dr.plan_within(model, params=0.4, calibration=calibration, layers=chosen)
    assert solved == [32, 64, 48, 12, 12, 12]
    dr.apply_plan(model, plan, calibration=calibration)
    assert len(solved) == 6


def test_a_tall_weight_with_dead_inputs_is_one_problem_with_orthonormal_directions(
    solved: list[int],
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 20) @ torch.randn(20, 64)
    x = torch.randn(500, 64)
    x[:, ::3] = 0
    found = principal_of_inputs(weight, x.double().T @ x.double() / 500)
    assert solved == [64]
    assert_close(found.basis.T @ found.basis, torch.eye(64), 1e-5)
    outputs = weight.double() @ x.double().T
    assert_close(found.energies.sum(), outputs.square().sum() / 500, 1e-5)


def test_what_is_remembered_is_of_one_weight() -> None:
    """A tall weight's directions depend on it: another step in between, and they are new."""
    model, x = network()
    calibration = dr.calibrate(model, [x])
    dr.plan_within(model, params=0.5, calibration=calibration)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    afresh = {
        path: ActivationStats(one.side, one.second, one.count, one.mean)
        for path, one in calibration.items()
    }
    twin = copy.deepcopy(model)
    dr.factorize(model, 6, layers=["0", "2"], calibration=calibration)
    dr.factorize(twin, 6, layers=["0", "2"], calibration=afresh)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_statistics_that_change_are_not_remembered() -> None:
    weight, x = problem((40, 24), -1.0)
    activity = statistics("output", weight, x)
    output_energies(weight, activity)
    activity.second.copy_(statistics("output", weight, x.flip(1)).second)
    afresh = ActivationStats("output", activity.second.clone(), activity.count)
    assert torch.equal(project(weight, 4, activity)[0], project(weight, 4, afresh)[0])


def test_a_mean_far_above_the_deviations_hides_nothing() -> None:
    """A covariance of outputs with mean 1000 and deviations of 0.01 to 1, in fp32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32))
    x = torch.randn(512, 16) * torch.logspace(-2, 0, 16)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16))
        model[0].bias.fill_(1000.0)
    exact = copy.deepcopy(model).double()
    for path in "01":
        one = dr.calibrate(model, x.split(100))[path]
        other = dr.calibrate(exact, x.double().split(100))[path]
        energies = [torch.linalg.eigvalsh(each.second[0].double()) for each in (one, other)]
        assert_close(energies[0].sqrt(), energies[1].sqrt(), 1e-3)
        assert one.mean is not None and other.mean is not None
        assert (one.mean - other.mean).abs().max() < 1e-6 * 1000
