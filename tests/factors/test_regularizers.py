"""Each penalty's gradient is that of its formula, in every form, and it lands where it should."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import assert_close, randomize
from torch import Tensor, nn

import dynarank as dr
from dynarank.factors.regularizers import (
    SRIP,
    FrobeniusDecay,
    Regularizer,
    SoftOrthogonality,
    orthogonality_gradient,
    srip_gradient,
    tall_matrices,
)
from dynarank.surgery.sites import survey

LAYERS = {
    "linear": lambda: nn.Linear(9, 7),
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, 3, groups=2),
}
FORMS = [dr.FullRank(), dr.LowRank(2), dr.Adapted(2, alpha=3.0)]


def eye_excess(f: Tensor) -> Tensor:
    return f.mT @ f - torch.eye(f.shape[-1], dtype=f.dtype)


def soft(f: Tensor) -> Tensor:
    return eye_excess(f).square().sum()


def double(f: Tensor) -> Tensor:
    return soft(f) + soft(f.mT)


def srip(f: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(eye_excess(f)).abs().amax(-1).sum()


def unit(f: Tensor) -> Tensor:
    return f / f.norm(dim=-2, keepdim=True)


def model_in(layer: str, form: dr.forms.Form, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(LAYERS[layer]()).to(dtype)
    dr.apply_plan(model, {"0": form})
    randomize(model)
    return model


def added(model: nn.Module, regularizer: Regularizer) -> dict[str, Tensor]:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    regularizer.add_gradients()
    return {name: p.grad for name, p in model.named_parameters()}


def by_autograd(model: nn.Module, penalty: Tensor) -> dict[str, Tensor]:
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(penalty, parameters, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for n, p, g in zip(names, parameters, grads, strict=True)
    }


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert any(g.any() for g in expected.values())
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_frobenius_decay_is_the_gradient_of_half_the_effective_weight_squared(
    layer: str, form: dr.forms.Form
) -> None:
    model = model_in(layer, form)
    penalty = 0.3 / 2 * survey(model)[0].effective().square().sum()
    compare(added(model, FrobeniusDecay(model, 0.3)), by_autograd(model, penalty))


def test_the_adapter_alone_can_be_decayed() -> None:
    model = model_in("grouped", FORMS[2])
    site = survey(model)[0]
    joined = site.spec.decomposition(FORMS[2]).join(site.factors())
    penalty = 0.3 / 2 * (1.5 * joined).square().sum()
    actual = added(model, FrobeniusDecay(model, 0.3, adapted="adapter"))
    compare(actual, by_autograd(model, penalty))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("cls", "formula", "options"),
    [
        (SoftOrthogonality, soft, {}),
        (SRIP, srip, {"iterations": 3000}),
    ],
)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_orthogonality_is_the_gradient_of_its_formula(
    layer, form, cls, formula, options, normalized
) -> None:
    model = model_in(layer, form)
    if cls is SRIP and normalized and int(form.rank) == 2:
        dr.apply_plan(model, {"0": dr.LowRank(3)})  # at rank 2 the eigenvalues are +-cos: a tie
        randomize(model)
    site = survey(model)[0]
    ends = tall_matrices(site.spec.decomposition(site.form), site.factors())
    penalty = 0.3 * sum(formula(unit(f) if normalized else f) for f in ends)
    actual = added(model, cls(model, 0.3, normalized=normalized, **options))
    compare(actual, by_autograd(model, penalty))


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 12), r=st.integers(1, 12), seed=st.integers(0, 99))
def test_soft_orthogonality_of_any_shape(m: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(m, r, generator=generator, dtype=torch.float64, requires_grad=True)
    for formula, times in ((soft, 1), (double, 2)):
        (expected,) = torch.autograd.grad(formula(f), f)
        assert_close(times * orthogonality_gradient(f.detach()), expected, 1e-11)


def test_orthonormal_factors_get_nothing() -> None:
    q = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q
    assert orthogonality_gradient(q).abs().max() < 1e-14
    assert srip_gradient(torch.eye(4, 2)).eq(0).all()
    assert (
        SoftOrthogonality(model_in("linear", dr.FullRank()), 1.0).gradients(
            survey(model_in("linear", dr.FullRank()))[0]
        )
        == []
    )


@pytest.mark.parametrize("cls", [FrobeniusDecay, SoftOrthogonality, SRIP])
def test_bf16_nan_frozen_and_random_state(cls: type[Regularizer]) -> None:
    model = model_in("linear", dr.LowRank(3), torch.bfloat16)
    exact = model_in("linear", dr.LowRank(3))
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    state = torch.get_rng_state()
    low, high = added(model, cls(model, 0.1)), added(exact, cls(exact, 0.1))
    for name in ("0.down", "0.up"):
        assert low[name].dtype == torch.bfloat16
        assert_close(low[name], high[name].bfloat16())
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        model[0].down[0, 0] = float("nan")
    assert all(g.isfinite().all() for g in added(model, cls(model, 0.1)).values())
    exact[0].down.requires_grad_(False)
    grads = added(exact, cls(exact, 0.1))
    assert not grads["0.down"].any() and grads["0.up"].any() and not grads["0.bias"].any()
    exact[0].up.grad = None
    cls(exact, 0.1).add_gradients()
    assert exact[0].up.grad is None


def test_registered_it_survives_changes_of_form_and_can_be_removed() -> None:
    model = nn.Sequential(nn.Linear(9, 7, bias=False)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = FrobeniusDecay(model, 0.2).register(optimizer)

    def check(factor: float) -> None:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        wanted = by_autograd(model, 0.1 * survey(model)[0].effective().square().sum())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert_close(p.detach(), before[name] - factor * wanted[name])

    check(0.5)
    dr.factorize(model, rank=3, layers="*", optimizer=optimizer)
    check(0.5)
    dr.inflate(model, optimizer=optimizer)
    check(0.5)
    dr.deflate(model, to="adapted", optimizer=optimizer)
    check(0.5)
    dr.merge(model, optimizer=optimizer)
    check(0.5)
    handle.remove()
    check(0.0)


class Wrapper:
    """As accelerate's: it has an optimizer, and no hooks of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.state = optimizer, optimizer.state

    @property
    def param_groups(self) -> list:
        return self.optimizer.param_groups


def decayed_run(start: int, steps: int, saved: list[dict] | None = None) -> tuple[list, list]:
    """Losses and states of a run under a schedule, from its start or from what was saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    FrobeniusDecay(model, 0.2, layers="0").register(Wrapper(optimizer))  # type: ignore[arg-type]
    forms = dr.FullRank(), dr.LowRank(3), dr.FullRank(), dr.Adapted(2)
    schedule = dr.schedules.Phases([0, 0.25, 0.5, 0.75], forms)
    ranks = dr.RankScheduler(model, optimizer, schedule, 8, layers="0")
    if saved is not None:
        for part, state in zip((ranks, model, optimizer), saved, strict=True):
            part.load_state_dict(copy.deepcopy(state))
    losses, states = [], []
    for step in range(start, start + steps):
        states.append([copy.deepcopy(p.state_dict()) for p in (ranks, model, optimizer)])
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        ranks.step()
        losses.append(loss.item())
    return losses, states


def test_a_resumed_run_under_a_schedule_is_the_same_bit_by_bit() -> None:
    losses, states = decayed_run(0, 8)
    for step in range(1, 8):
        assert decayed_run(step, 8 - step, states[step])[0] == losses[step:]


def test_errors() -> None:
    model = model_in("linear", dr.LowRank(2))
    for bad in (-1.0, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="finite and >= 0"):
            FrobeniusDecay(model, bad)
    with pytest.raises(ValueError, match="adapter"):
        FrobeniusDecay(model, 1.0, adapted="base")
    with pytest.raises(ValueError, match="at least 1"):
        SRIP(model, 1.0, iterations=0)
    with pytest.raises(ValueError, match="matches no layer"):
        SRIP(model, 1.0, layers="nothing")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SRIP(model, 1.0).register(optimizer)
    optimizer.step()
    with pytest.raises(ValueError, match="end of the closure"):
        optimizer.step(lambda: 0.0)


def test_a_loss_scale_that_the_optimizer_removes_is_applied() -> None:
    model = model_in("linear", dr.LowRank(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    plain = added(model, FrobeniusDecay(model, 0.1))["0.up"].clone()
    FrobeniusDecay(model, 0.1).register(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_close(model[0].up.grad, plain)  # the fused step has unscaled it by now
