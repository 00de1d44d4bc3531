"""A scaled step is the step with a scaled learning rate, for every optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from laws import assert_close, randomize
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import dynarank as dr
from dynarank.factors.learning_rates import (
    FactorLearningRates,
    root_mean_square_rate,
    spectral_rate,
    spectron_rate,
)
from dynarank.surgery.sites import survey

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.02),
    "momentum": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1, dampening=0.2),
    "nesterov": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: Adam(p, lr=0.02, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.02, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.02, momentum=0.5),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).double()
    return dr.factorize(model, {"0": 3, "2": 2})


def steps(model: nn.Module, optimizer: Optimizer, n: int, start: int = 0) -> None:
    for i in range(start, start + n):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().add(model(x).sin().sum()).backward()
        optimizer.step()


def split_groups(model: nn.Module, scales: dict[str, float], make: Callable) -> Optimizer:
    """The optimizer with a group of its own, and learning rate, for each scaled weight."""
    factors = {s.path: list(s.factors()) for s in survey(model) if s.path in scales}
    scaled = {id(p) for group in factors.values() for p in group}
    optimizer = make([p for p in model.parameters() if id(p) not in scaled])
    for path, group in factors.items():
        optimizer.add_param_group({"params": group, "lr": 0.02 * scales[path]})
    return optimizer


@pytest.mark.parametrize("rule", ["spectral", "spectron", "rms", "rank-share", 0.25])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_a_group_with_a_scaled_learning_rate(name: str, rule: str | float) -> None:
    model = network()
    other = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    rates = FactorLearningRates(model, optimizer, rule, every=1000)
    scales = rates.scales()
    assert set(scales) == {"0", "2"} and all(s != 1 for s in scales.values())
    steps(model, optimizer, 6)
    steps(other, split_groups(other, scales, OPTIMIZERS[name]), 6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(p.detach(), q.detach())
    assert optimizer.state_dict()["param_groups"] == before


def test_a_plain_step_differs() -> None:
    model, other = network(), network()
    optimizer, plain = (OPTIMIZERS["sgd"](m.parameters()) for m in (model, other))
    rates = FactorLearningRates(model, optimizer, 0.5)
    steps(model, optimizer, 1)
    steps(other, plain, 1)
    assert torch.equal(model[3].weight, other[3].weight)
    assert not torch.allclose(model[0].up, other[0].up)
    rates.remove()
    other.load_state_dict(model.state_dict())
    steps(model, optimizer, 2, 1)
    steps(other, plain, 2, 1)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_it_survives_changes_of_form() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    rates = FactorLearningRates(model, optimizer, every=10**6)
    steps(model, optimizer, 1)
    assert rates.scales() == {}
    dr.factorize(model, {"0": 2}, optimizer=optimizer)
    twin = copy.deepcopy(model)
    other = split_groups(twin, {"0": expected(model)}, OPTIMIZERS["momentum"])
    state = {id(p): v for p, v in optimizer.state.items()}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        other.state[q] = copy.deepcopy(state[id(p)])
    steps(model, optimizer, 2, 1)
    steps(twin, other, 2, 1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.detach(), q.detach())
    dr.deflate(dr.inflate(model, optimizer=optimizer), optimizer=optimizer)
    assert rates.scales() == {}
    steps(model, optimizer, 1)


def expected(model: nn.Module) -> float:
    """1 / (2 mean(s)) by an SVD of the effective weight."""
    values = torch.linalg.svdvals(survey(model)[0].effective().flatten(1))
    rank = survey(model)[0].form.rank
    return 1 / (2 * values[:rank].mean().item())


@pytest.mark.parametrize("layer", [lambda: nn.Linear(7, 9), lambda: nn.Conv2d(4, 6, 3)])
def test_the_spectral_rate_is_that_of_the_singular_values(layer: Callable) -> None:
    model = dr.factorize(nn.Sequential(layer()).double(), 3, layers="*")
    rates = FactorLearningRates(model, SGD(model.parameters(), lr=0.1), cap=1e9)
    assert rates.scales()["0"] == pytest.approx(expected(model), rel=1e-12)
    assert FactorLearningRates(model, Adam(model.parameters())).scales()["0"] == 1


def moved(down: Tensor, up: Tensor, step_down: Tensor, step_up: Tensor) -> Tensor:
    return step_up @ down + up @ step_down


def test_a_scaled_step_is_as_long_as_a_full_rank_one() -> None:
    """In the singular basis the components inside the factors' span move by eta on average."""
    g = torch.Generator().manual_seed(0)
    s = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(9, 3, generator=g, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(7, 3, generator=g, dtype=torch.float64)).Q
    down, up = s.sqrt()[:, None] * right.T, left * s.sqrt()
    m = torch.randn(9, 7, generator=g, dtype=torch.float64)
    inside = left.T @ moved(down, up, up.T @ m, m @ down.T) @ right
    multiplier = inside / (left.T @ m @ right)
    assert_close(multiplier, s[:, None] + s)
    rate = torch.tensor(spectral_rate((down, up), 3), dtype=torch.float64)
    assert_close(rate * multiplier.mean(), torch.ones((), dtype=torch.float64))


def test_the_rms_rate_for_steps_of_one_size() -> None:
    g = torch.Generator().manual_seed(0)
    down = torch.randn(5, 200, generator=g, dtype=torch.float64)
    up = torch.randn(150, 5, generator=g, dtype=torch.float64) / 3
    rate = root_mean_square_rate((down, up))
    squares = []
    for _ in range(40):
        signs = [torch.randn(f.shape, generator=g, dtype=torch.float64).sign() for f in (down, up)]
        squares.append((rate * moved(down, up, *signs)).square().mean())
    assert abs(torch.stack(squares).mean().item() - 1) < 0.02


def test_the_spectron_rate_bounds_the_step() -> None:
    g = torch.Generator().manual_seed(0)
    down = torch.randn(3, 7, generator=g, dtype=torch.float64)
    up = torch.randn(9, 3, generator=g, dtype=torch.float64)
    rate = spectron_rate((down, up))
    norm = lambda x: torch.linalg.matrix_norm(x, 2).item()  # noqa: E731
    assert rate == pytest.approx(1 / (norm(down) + norm(up) + 1), rel=1e-12)
    grouped = torch.cat([down, down / 9]), torch.cat([up, up / 9])
    assert spectron_rate(grouped, 2) == pytest.approx(rate, rel=1e-12)


def test_groups_count_each_on_their_own() -> None:
    model = dr.factorize(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)).double(), 2, layers="*")
    randomize(model)
    with torch.no_grad():
        for f in survey(model)[0].factors():
            f.copy_(torch.cat([f[: len(f) // 2]] * 2))
    down, up = survey(model)[0].factors()
    one = down[:2], up[:4]
    for rule, value in [
        ("spectral", spectral_rate(one, 2)),
        ("rms", root_mean_square_rate(one)),
        ("spectron", spectron_rate(one)),
        ("rank-share", 0.5),
    ]:
        rates = FactorLearningRates(model, SGD(model.parameters(), lr=0.1), rule, cap=1e9)
        assert rates.scales()["0"] == pytest.approx(value, rel=1e-12)


def test_cap_refresh_zero_and_nan() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    rates = FactorLearningRates(model, optimizer, every=3, cap=4.0)
    with torch.no_grad():
        model[0].up.zero_()
        model[0].down.zero_()
        model[2].up.fill_(float("nan"))
    assert rates.scales() == {"0": 4.0, "2": 1.0}
    with torch.no_grad():
        model[0].up.fill_(10.0)
    seen = []
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        seen.append(dict((s.path, v) for s, v in rates._scales)["0"])
    assert seen[:3] == [4.0] * 3 and seen[3] == pytest.approx(3 / (2400))


def test_frozen_and_foreign_factors_are_left_alone() -> None:
    model = network()
    optimizer = SGD([*model[2].parameters()], lr=0.1)
    FactorLearningRates(model, optimizer, 0.5)
    before = model[0].up.detach().clone()
    steps(model, optimizer, 1)
    assert torch.equal(before, model[0].up)


def test_errors() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    for rule in ("spectrum", 0.0, float("nan"), True):
        with pytest.raises(ValueError, match=r"rule|multiplier"):
            FactorLearningRates(model, optimizer, rule)
    with pytest.raises(ValueError, match="every"):
        FactorLearningRates(model, optimizer, every=0)
    with pytest.raises(ValueError, match="cap"):
        FactorLearningRates(model, optimizer, cap=0.0)
