"""Law 5 and 6: the optimizer's groups through a change of form, and the policies for its state."""

from __future__ import annotations

import pytest
import torch
from laws import LAYERS, LayerCase
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, LowRank
from dynarank.surgery.sites import survey

F64 = torch.float64


def stepped(case: LayerCase, steps: int = 5) -> tuple[nn.Sequential, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).to(F64)
    x = torch.randn(case.shape, dtype=F64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run(model, optimizer, x, steps)
    return model, optimizer, x


def run(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) + 0.1).pow(3).mean().backward()
        optimizer.step()


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
    with pytest.raises(ValueError, match=r"keeps sum, which cannot be moved .* moments='reset'"):
        dr.factorize(model, 2, optimizer=optimizer)
    assert model[0].weight is before and type(model[0]) is nn.Linear
    with pytest.raises(
        ValueError, match=r"'project', 'calibrated', 'reset', 'prune' or .*, got 'keep'"
    ):
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


def test_a_frozen_base_stays_bit_identical_and_the_adapter_moves() -> None:
    model, optimizer, x = stepped(LAYERS[0])
    optimizer.param_groups[0]["weight_decay"] = 0.1
    dr.deflate(model, 2, layers="*", optimizer=optimizer)
    base = model[0].base.detach().clone()
    factors = [f.detach().clone() for f in survey(model)[0].factors()]
    run(model, optimizer, x, 20)
    assert torch.equal(model[0].base, base)
    assert not any(
        torch.equal(f, old) for f, old in zip(survey(model)[0].factors(), factors, strict=True)
    )


def test_without_gradients_calibrated_projects() -> None:
    """The verbs called directly have no gradients to calibrate by."""
    states = []
    for moments in ("project", "calibrated"):
        model, optimizer, _ = stepped(LAYERS[0])
        dr.factorize(model, 3, layers="0", optimizer=optimizer, moments=moments)
        states.append([optimizer.state[p] for p in (model[0].down, model[0].up)])
    for one, two in zip(*states, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


OPTIONS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-3, fused=True),
    "maximize": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, dampening=0.1, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "tensor-rate": lambda p: torch.optim.AdamW(p, torch.tensor(1e-3), foreach=False),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
}


@pytest.mark.parametrize("moments", ["project", "reset"])
@pytest.mark.parametrize("kind", sorted(OPTIONS))
def test_training_goes_on_in_every_variant(kind: str, moments: str) -> None:
    """Each factor moves in the step after each change, each state fits, and all is saved."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    optimizer = OPTIONS[kind](model.parameters())
    run(model, optimizer, x, 6)
    for form in (LowRank(3), dr.FullRank(), Adapted(2), LowRank(2)):
        dr.apply_plan(model, {"0": form}, optimizer=optimizer, moments=moments)
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        run(model, optimizer, x, 2)
        for name, p in model.named_parameters():
            assert torch.equal(p, old[name]) != p.requires_grad, name
        for p, state in optimizer.state.items():
            assert all(v.shape in (p.shape, ()) for v in state.values() if v is not None)
        optimizer.load_state_dict(optimizer.state_dict())
