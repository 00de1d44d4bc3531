"""Law 6: what becomes of the optimizer's moments, against its own formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from laws import LAYERS, LayerCase, assert_close
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.decompositions import get_decomposition

SVD = get_decomposition("svd")
F64 = torch.float64
FEW = [LAYERS[0], LAYERS[1], LAYERS[3], LAYERS[-1]]
over_layers = pytest.mark.parametrize("case", FEW, ids=str)


def stepped(
    case: LayerCase, steps: int = 5, kind: str = "adam"
) -> tuple[nn.Sequential, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).to(F64)
    x = torch.randn(case.shape, dtype=F64)
    optimizer = (
        torch.optim.Adam(model.parameters(), lr=1e-3)
        if kind == "adam"
        else torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    )
    run(model, optimizer, x, steps)
    return model, optimizer, x


def run(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) + 0.1).pow(3).mean().backward()
        optimizer.step()


def moments(optimizer: torch.optim.Optimizer, layer: nn.Module, key: str) -> dict[str, Tensor]:
    named = [(n, p) for n, p in layer.named_parameters() if n != "bias" and p.requires_grad]
    return {name: optimizer.state[p][key].flatten(1) for name, p in named}


@over_layers
@pytest.mark.parametrize(("kind", "key"), [("sgd", "momentum_buffer"), ("adam", "exp_avg")])
def test_to_factors_by_the_vjp_of_join(case: LayerCase, kind: str, key: str) -> None:
    """M_up = M down', M_down = up' M."""
    model, optimizer, _ = stepped(case, kind=kind)
    m = moments(optimizer, model[0], key)["weight"]
    dr.apply_plan(model, {"0": LowRank(3)}, optimizer=optimizer)
    down, up = (f.flatten(1) for f in model[0].factors)
    after = moments(optimizer, model[0], key)
    assert_close(after["up"], m @ down.T)
    assert_close(after["down"], up.T @ m)


@over_layers
def test_to_an_adaptor_with_its_scale(case: LayerCase) -> None:
    model, optimizer, _ = stepped(case)
    m = moments(optimizer, model[0], "exp_avg")["weight"]
    dr.apply_plan(model, {"0": Adapted(3, alpha=6.0)}, optimizer=optimizer)
    after = moments(optimizer, model[0], "exp_avg")
    assert_close(after["up"], 2.0 * m @ model[0].down.flatten(1).T)
    assert not after["down"].any()  # up is zero, and so is the down factor's gradient


@over_layers
@pytest.mark.parametrize("form", [LowRank(3), Adapted(3, alpha=6.0)], ids=str)
def test_the_lift_is_a_right_inverse_of_the_vjp(case: LayerCase, form: LowRank | Adapted) -> None:
    """What the factors knew of the gradient survives inflation: vjp(lift(M_f)) == M_f."""
    model, optimizer, x = stepped(case)
    dr.apply_plan(model, {"0": form}, optimizer=optimizer, moments="reset")
    run(model, optimizer, x, 4)
    run(model, torch.optim.SGD(model.parameters(), 0.3), x, 1)  # away from up == 0
    factors = tuple(f.detach() for f in model[0].factors)
    scale = form.scale if isinstance(form, Adapted) else 1.0
    gradient = torch.randn(model[0].spec().shape, dtype=F64)
    down, up = (f.flatten(1) for f in factors)
    for name, value in [
        ("up", scale * gradient.flatten(1) @ down.T),
        ("down", scale * up.T @ gradient.flatten(1)),
    ]:
        parameter = getattr(model[0], name)
        optimizer.state[parameter]["exp_avg"] = value.reshape(parameter.shape)
    dr.inflate(model, optimizer=optimizer)
    lifted = moments(optimizer, model[0], "exp_avg")["weight"]
    assert_close(scale * lifted @ down.T, scale * gradient.flatten(1) @ down.T, 1e-9)
    assert_close(scale * up.T @ lifted, scale * up.T @ gradient.flatten(1), 1e-9)
    assert lifted.norm() <= gradient.norm() * (1 + 1e-9)  # the least such M


def test_the_lift_is_the_tangent_projection() -> None:
    """lift(vjp(M)) = M - (I - P_U) M (I - P_V), which is M itself on the tangent space."""
    down, up, m = (torch.randn(s, dtype=F64) for s in [(3, 9), (7, 3), (7, 9)])
    lifted = SVD.lift((down, up), (up.T @ m, m @ down.T))
    left = torch.eye(7, dtype=F64) - up @ torch.linalg.pinv(up)
    right = torch.eye(9, dtype=F64) - torch.linalg.pinv(down) @ down
    assert_close(lifted, m - left @ m @ right, 1e-10)


def test_squares_to_factors_are_exact_for_independent_entries() -> None:
    """Monte Carlo: E[(G V')^2] for G of independent entries, mean M and variance S."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).to(F64)
    mean, spread = torch.randn(5, 6, dtype=F64), torch.rand(5, 6, dtype=F64) + 0.5
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.state[model[0].weight] = {
        "step": torch.tensor(3.0),
        "exp_avg": mean.clone(),
        "exp_avg_sq": spread.square() + mean.square(),
    }
    dr.apply_plan(model, {"0": LowRank(2)}, optimizer=optimizer)
    g = mean + spread * torch.randn(200_000, 5, 6, dtype=F64)
    down, up = model[0].factors
    after = moments(optimizer, model[0], "exp_avg_sq")
    assert_close(after["up"], (g @ down.T).square().mean(0), 0.02)
    assert_close(after["down"], (up.T @ g).square().mean(0), 0.02)
    assert all(optimizer.state[p]["step"] == 3.0 for p in model[0].factors)


def test_squares_from_factors_recover_a_rank_one_second_moment() -> None:
    torch.manual_seed(0)
    row, col = torch.rand(5, dtype=F64) + 0.5, torch.rand(6, dtype=F64) + 0.5
    second = torch.outer(row, col)
    down, up = torch.randn(2, 6, dtype=F64), torch.randn(5, 2, dtype=F64)
    squares = (up.T.square() @ second, second @ down.T.square())
    lifted = SVD.lift_squares((down, up), squares)
    # Rows and columns come back exactly up to one common factor.
    ratio = lifted / second
    assert_close(ratio, ratio.mean().expand_as(ratio), 1e-10)
    assert 0.3 < ratio.mean().item() < 3


@over_layers
def test_second_moments_never_fall_below_the_squared_first(case: LayerCase) -> None:
    model, optimizer, x = stepped(case, steps=1)  # after one step v = 0.001 g^2 < m^2 = 0.01 g^2
    for form in (LowRank(3), FullRank(), Adapted(2), LowRank(2), Adapted(3), FullRank()):
        dr.apply_plan(model, {"0": form}, optimizer=optimizer)
        first = moments(optimizer, model[0], "exp_avg")
        second = moments(optimizer, model[0], "exp_avg_sq")
        for name in first:
            assert (second[name] >= first[name].square() * (1 - 1e-12)).all()
            assert torch.isfinite(second[name]).all()
        run(model, optimizer, x, 1)


@pytest.mark.parametrize("form", [LowRank(3), Adapted(3)], ids=str)
def test_reset_forgets_the_layer_and_nothing_else(form: LowRank | Adapted) -> None:
    model, optimizer, x = stepped(LAYERS[0])
    bias = {k: v.clone() for k, v in optimizer.state[model[0].bias].items()}
    dr.apply_plan(model, {"0": form}, optimizer=optimizer, moments="reset")
    assert set(optimizer.state) == {model[0].bias}
    assert all(torch.equal(v, bias[k]) for k, v in optimizer.state[model[0].bias].items())
    run(model, optimizer, x, 1)
    assert optimizer.state[model[0].up]["step"] == 1


def test_an_optimizer_that_has_not_stepped_has_nothing_to_move() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    dr.factorize(model, 2, optimizer=optimizer)
    assert not optimizer.state


def test_plain_sgd_has_no_moments() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model, optimizer, torch.randn(3, 8), 2)
    dr.factorize(model, 2, optimizer=optimizer)
    run(model, optimizer, torch.randn(3, 8), 1)


def test_an_unknown_state_is_refused_under_project_and_dropped_under_reset() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.Adagrad(model.parameters())
    run(model, optimizer, torch.randn(3, 8), 1)
    before = model[0].weight
    with pytest.raises(ValueError, match=r"keeps sum, which is not known .* moments='reset'"):
        dr.factorize(model, 2, optimizer=optimizer)
    assert model[0].weight is before and type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match='"project" or "reset", got \'keep\''):
        dr.factorize(model, 2, optimizer=optimizer, moments="keep")  # type: ignore[arg-type]


def test_groups_keep_their_order_place_options_and_names() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(
        [
            {"params": list(model[0].named_parameters()), "lr": 0.3},
            {"params": [("net.1.weight", model[1].weight), ("net.2.weight", model[2].weight)]},
            {"params": [("net.1.bias", model[1].bias), ("net.2.bias", model[2].bias)]},
        ],
        lr=0.1,
        momentum=0.9,
    )
    groups = list(map(id, optimizer.param_groups))
    dr.factorize(model, 2, layers="1", optimizer=optimizer)
    assert list(map(id, optimizer.param_groups)) == groups
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert held[1] == [id(model[1].down), id(model[1].up), id(model[2].weight)]
    assert optimizer.param_groups[1]["param_names"] == ["net.1.down", "net.1.up", "net.2.weight"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1, 0.1]
    dr.deflate(dr.inflate(model, optimizer=optimizer), 2, optimizer=optimizer)
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert held[1] == [id(model[1].down), id(model[1].up), id(model[2].weight)]  # no frozen base
    dr.merge(model, optimizer=optimizer)
    assert optimizer.param_groups[1]["param_names"] == ["net.1.weight", "net.2.weight"]
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_frozen_base_stays_bit_identical_and_the_adaptor_moves() -> None:
    model, optimizer, x = stepped(LAYERS[0])
    optimizer.param_groups[0]["weight_decay"] = 0.1
    dr.deflate(model, 2, layers="*", optimizer=optimizer)
    base = model[0].base.detach().clone()
    factors = [f.detach().clone() for f in model[0].factors]
    run(model, optimizer, x, 20)
    assert torch.equal(model[0].base, base)
    assert not any(torch.equal(f, old) for f, old in zip(model[0].factors, factors, strict=True))
