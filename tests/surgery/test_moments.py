"""What becomes of moments: the first exactly, the second within its bound, by steps that follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from covering import over
from hypothesis import given, settings
from laws import ALL_FORMS, DECOMPOSITIONS, LAYERS, LayerCase, assert_close, fitting, randomize
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.decompositions import Factors, get_decomposition
from dynarank.forms import Form, same_weight
from dynarank.monitors.gradient_window import GradientWindow
from dynarank.surgery.moments import carry
from dynarank.surgery.side import Side
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.state_layout import Averaging

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's
NAMES = ["linear", "linear-tall", "conv-tall", "conv-grouped", "conv-depthwise", "transposed-2d"]
FEW = [case for case in LAYERS if case.name in (*NAMES, "gpt2-conv1d")]
FORMS = [f for d in DECOMPOSITIONS for f in (LowRank(3, d), Adapted(3, d, alpha=6.0))]
over_forms = pytest.mark.parametrize("form", FORMS, ids=str)


def build(case: LayerCase) -> tuple[nn.Sequential, Site]:
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).to(F64)
    return model, site(model)


def site(model: nn.Module) -> Site:
    (one,) = survey(model)
    return one


def held(model: nn.Module) -> list[nn.Parameter]:
    one = site(model)
    return [p for name, p in one.parameters().items() if not one.spec.is_base(name)]


def pulled(model: nn.Module, moment: Tensor) -> Factors:
    """The vjp of the effective weight, by automatic differentiation."""
    return torch.autograd.grad((site(model).effective() * moment).sum(), held(model))


def linear_step(optimizer: Optimizer, parameters: list[nn.Parameter], gradient: Any) -> None:
    for p, g in zip(parameters, gradient, strict=True):
        p.grad = g.clone()
    optimizer.step()


# The first moment.


@over({"case": FEW, "form": FORMS, "kind": [SGD, Adam]})
def test_to_factors_is_the_vjp_of_the_weight(case: LayerCase, form: Form, kind: Any) -> None:
    """M_f == J(M), in every orientation of the weight."""
    model, one = build(case)
    weight = held(model)[0]
    optimizer = SGD([weight], 0.0, momentum=0.9) if kind is SGD else Adam([weight], 0.0)
    for _ in range(3):
        linear_step(optimizer, [weight], [torch.randn_like(weight)])
    key = "momentum_buffer" if kind is SGD else "exp_avg"
    moment = one.spec.to_canonical(optimizer.state[weight][key])
    dr.apply_plan(model, {one.path: fitting(model, form)}, optimizer=optimizer)
    for p, expected in zip(held(model), pulled(model, moment), strict=True):
        actual = optimizer.state[p].get(key, torch.zeros_like(p))
        assert_close(actual, expected)


@over({"case": FEW, "form": FORMS})
def test_from_factors_what_they_knew_survives(case: LayerCase, form: Form) -> None:
    """J(J+(J(G))) == J(G), and the lifted moment is no larger than G."""
    model, one = build(case)
    dr.apply_plan(model, {one.path: fitting(model, form)})
    randomize(model)
    known = site(model)
    old = Side.of(known.spec, known.form, {n: p.detach() for n, p in known.parameters().items()})
    gradient = torch.randn(known.shape, dtype=F64)
    optimizer = SGD(held(model), 0.0, momentum=0.9)
    linear_step(optimizer, held(model), pulled(model, gradient))
    dr.inflate(model, optimizer=optimizer)
    lifted = one.spec.to_canonical(optimizer.state[held(model)[0]]["momentum_buffer"])
    for actual, expected in zip(old.pull(lifted), old.pull(gradient), strict=True):
        assert_close(actual, expected, 1e-9)
    assert lifted.norm() <= gradient.norm() * (1 + 1e-9)


def test_the_lift_is_the_tangent_projection() -> None:
    """lift(vjp(M)) = M - (I - P_U) M (I - P_V), which is M itself on the tangent space."""
    down, up, m = (torch.randn(s, dtype=F64) for s in [(3, 9), (7, 3), (7, 9)])
    lifted = get_decomposition("svd").lift((down, up), (up.T @ m, m @ down.T))
    left = torch.eye(7, dtype=F64) - up @ torch.linalg.pinv(up)
    right = torch.eye(9, dtype=F64) - torch.linalg.pinv(down) @ down
    assert_close(lifted, m - left @ m @ right, 1e-10)


# Weight decay is no gradient.


def decayed(kind: Callable[..., Optimizer], steps: int, form: Form) -> tuple[Tensor, Tensor]:
    """What the weight's first moment is after inflation, and what it would be if never factored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12, bias=False)).double()
    dr.apply_plan(model, {"0": form})
    with torch.no_grad():  # as an adapter is after a few steps
        model[0].up.copy_(1e-4 * torch.randn(12, 4, dtype=F64))
    optimizer = kind(held(model))
    gradient = torch.randn(12, 16, dtype=F64)
    gradient = site(model).spec.to_canonical(gradient)
    for _ in range(steps):
        linear_step(optimizer, held(model), pulled(model, gradient))
    dr.inflate(model, optimizer=optimizer)
    state, weight = optimizer.state[model[0].weight], model[0].weight.detach()
    moment = state["momentum_buffer"] if "momentum_buffer" in state else state["exp_avg"]
    gain = (1 - 0.9**steps) * (10 if kind is sgd else 1)
    return moment, gain * (gradient + 5e-4 * weight)


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, 1e-9, momentum=0.9, weight_decay=5e-4)


def adam(parameters: Any) -> Optimizer:
    return Adam(parameters, 1e-9, weight_decay=5e-4)


@pytest.mark.parametrize("steps", [1, 5, 60])
@pytest.mark.parametrize("kind", [sgd, adam])
def test_decay_is_not_lifted_as_a_gradient(kind: Callable[..., Optimizer], steps: int) -> None:
    """With ``up`` of size 1e-4 the share of decay alone would come back 100 times too large."""
    moment, truth = decayed(kind, steps, Adapted(4, alpha=4.0))
    assert moment.norm() <= 1.1 * truth.norm()
    cosine = (moment * truth).sum() / (moment.norm() * truth.norm())
    assert cosine > 0.6  # what factors of rank 4 of 12 see of a random gradient


def test_the_share_of_decay_goes_on_as_decay() -> None:
    """A weight that only decays: m = c W becomes m' = c f', and comes back as c W."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    optimizer = SGD(held(model), 1e-9, momentum=0.9, weight_decay=5e-4)
    for _ in range(200):
        linear_step(optimizer, held(model), [torch.zeros_like(model[0].weight)])
    for after in (LowRank(2), FullRank()):
        dr.apply_plan(model, {"0": after}, optimizer=optimizer)
        for p in held(model):
            assert_close(optimizer.state[p]["momentum_buffer"], 5e-3 * p.detach(), 1e-6)


# The second moment and its bound.

KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda p: Adam(p, 1e-3),
    "adam-l2": lambda p: Adam(p, 1e-3, weight_decay=0.1),
    "amsgrad": lambda p: AdamW(p, 1e-3, amsgrad=True),
    "maximize": lambda p: AdamW(p, 1e-3, maximize=True),
    "foreach": lambda p: AdamW(p, 1e-3, foreach=True),
    "fused": lambda p: AdamW(p, 1e-3, fused=True),
    "radam": lambda p: RAdam(p, 1e-3, decoupled_weight_decay=True, weight_decay=0.01),
}


def hats(optimizer: Optimizer, p: Tensor, key: str = "exp_avg_sq") -> tuple[Tensor, Tensor]:
    state, (one, two) = optimizer.state[p], optimizer.param_groups[0]["betas"]
    step = float(state["step"])
    return state["exp_avg"] / (1 - one**step), state[key] / (1 - two**step)


def assert_bounded(model: nn.Module, optimizer: Optimizer) -> None:
    for p in held(model):
        if optimizer.state.get(p):
            for key in ("exp_avg_sq", "max_exp_avg_sq"):
                if key in optimizer.state[p]:
                    state = optimizer.state[p]
                    assert (state[key] >= state["exp_avg"].square() * (1 - 1e-9)).all()
                    first, second = hats(optimizer, p, key)
                    assert (second >= first.square() * (1 - 1e-9)).all()
                    assert torch.isfinite(second).all()


def train(model: nn.Module, optimizer: Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x * torch.randn(())) + 0.1).pow(3).mean().backward()
        optimizer.step()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FEW),
    st.sampled_from(sorted(KINDS)),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from(ALL_FORMS), st.booleans()), max_size=5),
)
def test_the_bound_holds_through_any_changes(case: LayerCase, kind: str, changes: Any) -> None:
    """v >= m^2 after every change, projected or calibrated, as kept and bias-corrected."""
    model, one = build(case)
    optimizer, x = KINDS[kind](model.parameters()), torch.randn(case.shape, dtype=F64)
    gradients = GradientWindow(model, optimizer, [one.path], length=3)
    for steps, form, calibrated in changes:
        gradients.watch([one.path] if calibrated else [])
        train(model, optimizer, x, steps)
        before, after = site(model).form, fitting(model, form)
        moments = gradients if calibrated else "project"
        dr.apply_plan(model, {one.path: after}, optimizer=optimizer, moments=moments)
        if not same_weight(before, after):  # else the optimizer's own averages stay
            assert_bounded(model, optimizer)


@pytest.mark.parametrize("kind", ["adam", "amsgrad", "maximize", "foreach", "fused"])
@pytest.mark.parametrize(("before", "after"), [(FullRank(), LowRank(3)), (LowRank(3), FullRank())])
@pytest.mark.parametrize("steps", [1, 10, 300])
def test_a_constant_gradient_steps_on_within_the_learning_rate(
    kind: str, before: Form, after: Form, steps: int
) -> None:
    """The next step after a change is the learning rate, or less while Adam's v is below m^2."""
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    dr.apply_plan(model, {"0": before})
    optimizer = KINDS[kind](held(model))
    for group in optimizer.param_groups:
        group.update(lr=1e-9, weight_decay=0.0)
    direction = torch.randn(6, 8, dtype=F64)
    gradient = pulled(model, direction)
    for _ in range(steps):
        linear_step(optimizer, held(model), gradient)
    dr.apply_plan(model, {"0": after}, optimizer=optimizer)
    moved = [hats(optimizer, p)[0] * (-1 if kind == "maximize" else 1) for p in held(model)]
    old = [p.detach().clone() for p in held(model)]
    linear_step(optimizer, held(model), moved)
    for p, q, g in zip(held(model), old, moved, strict=True):
        size = (p - q).abs()[g.abs() > 1e-3 * g.abs().max()]
        two = 1 - 0.999 ** (steps + 1)
        kept = max((1 - 0.999**steps) / (1 - 0.9**steps) ** 2, 1.0)  # v over m^2 after the bound
        second = 0.999 * kept * (1 - 0.9**steps) ** 2 + 0.001
        expected = min((1e-9 / math.sqrt(second / two)), 1e-9)
        assert ((size / expected - 1).abs() < 2e-2).all()


@pytest.mark.parametrize("steps", [2, 10, 2000])
def test_a_moment_without_a_second_one_cannot_explode(steps: int) -> None:
    """v = 0 where m is not (a dead unit just woken): the next step stays within the rate."""
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    weight = model[0].weight
    optimizer.state[weight] = {
        "step": torch.tensor(float(steps)),
        "exp_avg": torch.randn(6, 8, dtype=F64),
        "exp_avg_sq": torch.zeros(6, 8, dtype=F64),
    }
    dr.apply_plan(model, {"0": LowRank(3)}, optimizer=optimizer)
    old = [p.detach().clone() for p in held(model)]
    linear_step(optimizer, held(model), [torch.zeros_like(p) for p in held(model)])
    for p, q in zip(held(model), old, strict=True):
        assert 0 < (p - q).abs().max() <= 0.0101


def test_squares_to_factors_are_exact_for_independent_entries() -> None:
    """Monte Carlo: E[(G V')^2] for G of independent entries, mean M and variance S."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).to(F64)
    mean, spread = torch.randn(5, 6, dtype=F64), torch.rand(5, 6, dtype=F64) + 0.5
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.state[model[0].weight] = {
        "step": torch.tensor(1e5),
        "exp_avg": mean.clone(),
        "exp_avg_sq": spread.square() + mean.square(),
    }
    dr.apply_plan(model, {"0": LowRank(2)}, optimizer=optimizer)
    g = mean + spread * torch.randn(200_000, 5, 6, dtype=F64)
    down, up = model[0].down, model[0].up
    assert_close(optimizer.state[up]["exp_avg_sq"], (g @ down.T).square().mean(0), 0.02)
    assert_close(optimizer.state[down]["exp_avg_sq"], (up.T @ g).square().mean(0), 0.02)
    assert all(optimizer.state[p]["step"] == 1e5 for p in (down, up))


def test_squares_from_factors_recover_a_rank_one_second_moment() -> None:
    torch.manual_seed(0)
    row, col = torch.rand(5, dtype=F64) + 0.5, torch.rand(6, dtype=F64) + 0.5
    second = torch.outer(row, col)
    down, up = torch.randn(2, 6, dtype=F64), torch.randn(5, 2, dtype=F64)
    squares = (up.T.square() @ second, second @ down.T.square())
    lifted = get_decomposition("svd").lift_squares((down, up), squares)
    # Rows and columns come back exactly up to one common factor.
    ratio = lifted / second
    assert_close(ratio, ratio.mean().expand_as(ratio), 1e-10)
    assert 0.3 < ratio.mean().item() < 3


@over_forms
def test_calibrated_is_the_mean_square_of_each_gradient_taken_through(form: Form) -> None:
    """v' == s mean_t J(G_t)^2, however the entries of G vary together."""
    model, one = build(FEW[0])
    weight = held(model)[0]
    optimizer = AdamW([weight], 0.0)
    gradients = GradientWindow(model, optimizer, ["0"], length=8)
    common = torch.randn(12, dtype=F64)
    kept = [torch.outer(torch.randn(10, dtype=F64), common).bfloat16().double() for _ in range(12)]
    for g in kept:
        linear_step(optimizer, [weight], [g])
    known = hats(optimizer, weight)[1].sum() / torch.stack(kept[-8:]).square().mean(0).sum()
    dr.apply_plan(model, {"0": fitting(model, form)}, optimizer=optimizer, moments=gradients)
    parts = [pulled(model, one.spec.to_canonical(g)) for g in kept[-8:]]
    for i, p in enumerate(held(model)):
        if not optimizer.state.get(p):
            assert not any(part[i].any() for part in parts)
            continue
        expected = known * torch.stack([part[i].square() for part in parts]).mean(0)
        state, two = optimizer.state[p], optimizer.param_groups[0]["betas"][1]
        raw = expected * (1 - two ** float(state["step"]))
        assert_close(state["exp_avg_sq"], torch.maximum(raw, state["exp_avg"].square()), 1e-5)


def test_what_gets_nothing_starts_as_new() -> None:
    """An adapter's ``down`` has no gradient yet: no counter of steps it never took part in."""
    model, _ = build(FEW[0])
    optimizer = AdamW(held(model))
    train(model, optimizer, torch.randn(FEW[0].shape, dtype=F64), 3)
    dr.apply_plan(model, {"0": Adapted(2)}, optimizer=optimizer)
    assert set(optimizer.state) == {model[0].up}
    assert optimizer.state[model[0].up]["step"] == 3


def test_an_optimizer_without_averages_carries_none() -> None:
    _, one = build(FEW[0])
    side = Side.of(one.spec, FullRank(), {n: p.detach() for n, p in one.parameters().items()})
    averaging = Averaging.of({"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1})
    assert (averaging.gain, averaging.decay) == (pytest.approx(5.0), 0.1)
    assert carry(side, side, [{}], averaging) == [{}]
