"""Law 5: which group each new parameter goes to, and where, through any sequence of changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.forms import Form


def two_groups(form: Form, named: bool = False) -> tuple[nn.Sequential, Optimizer]:
    """LoRA+: ``up`` and the biases have other options than ``down``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    dr.apply_plan(model, {"0": form, "1": form})
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    down = [(n, p) if named else p for n, p in own if n.endswith("down")]
    rest = [(n, p) if named else p for n, p in own if not n.endswith("down")]
    groups = [{"params": down, "lr": 1e-3}, {"params": rest, "lr": 1e-2, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups)


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 12)).square().mean().backward()
    optimizer.step()


def names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    known = {id(p): name for name, p in model.named_parameters()}
    return [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]


START = [["0.down", "1.down"], ["0.bias", "0.up", "1.bias", "1.up"]]
LORA_PLUS = [
    [LowRank(4)],
    [Adapted(3)],
    [FullRank(), Adapted(2)],
    [FullRank(), LowRank(5), FullRank(), Adapted(2)],
    [LowRank(2, "cp"), LowRank(2)],
    [FullRank(), LowRank(2, "separable"), LowRank(3)],
]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("forms", LORA_PLUS, ids=str)
@pytest.mark.parametrize("start", [LowRank(3), Adapted(3)], ids=str)
def test_each_factor_returns_to_its_group_and_place(
    start: Form, forms: list[Form], named: bool
) -> None:
    model, optimizer = two_groups(start, named)
    before = names(model, optimizer)
    for form in forms:
        for path in ("1", "0"):
            dr.apply_plan(model, {path: form}, optimizer=optimizer, moments="reset")
        step(model, optimizer)
    assert names(model, optimizer) == before
    if named:
        assert [group["param_names"] for group in optimizer.param_groups] == before
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]


def test_a_weight_made_of_factors_has_the_options_of_the_first_and_empty_groups_stay() -> None:
    model = dr.factorize(nn.Sequential(nn.Linear(8, 8, bias=False)), 2, layers="*")
    optimizer = torch.optim.SGD(
        [{"params": [model[0].up], "lr": 0.2}, {"params": [model[0].down], "lr": 0.1}]
    )
    dr.inflate(model, optimizer=optimizer)
    assert names(model, optimizer) == [[], ["0.weight"]]
    dr.deflate(dr.merge(model), 3, optimizer=optimizer)
    assert names(model, optimizer) == [["0.up"], ["0.down"]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


def test_places_are_those_of_a_run_that_went_another_way() -> None:
    """So that a checkpoint, which names parameters by their position, fits."""
    one, two = two_groups(LowRank(3)), two_groups(LowRank(3))
    for forms, (model, optimizer) in (([FullRank(), Adapted(2)], one), ([Adapted(2)], two)):
        for form in forms:
            dr.apply_plan(model, {"0": form}, optimizer=optimizer)
    assert names(*one) == names(*two)


def test_groups_that_a_user_changed_meanwhile_are_followed() -> None:
    model, optimizer = two_groups(LowRank(3))
    dr.inflate(model, optimizer=optimizer)
    extra = nn.Parameter(torch.ones(3))
    optimizer.param_groups[1]["params"].append(extra)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.extra = extra
    dr.deflate(model, 2, optimizer=optimizer)
    assert [sorted(held) for held in names(model, optimizer)] == [
        ["0.down", "1.down"], ["0.bias", "0.up", "1.bias", "1.up", "extra"]
    ]  # fmt: skip


def test_in_groups_that_a_user_made_again_factors_stand_with_their_weight() -> None:
    model, optimizer = two_groups(LowRank(3))
    dr.inflate(model, optimizer=optimizer)
    (first, second), optimizer.param_groups = optimizer.param_groups, []
    for layer in model:
        optimizer.add_param_group({**first, "params": list(layer.parameters())})
    dr.deflate(model, 2, optimizer=optimizer)
    assert names(model, optimizer) == [["0.down", "0.up", "0.bias"], ["1.down", "1.up", "1.bias"]]
    assert second["lr"] == 1e-2


def test_a_parameter_listed_twice_is_held_once_after_its_change() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([*model.parameters(), model[0].weight], lr=0.1)
    dr.factorize(model, 2, optimizer=optimizer)
    assert names(model, optimizer) == [["0.down", "0.up", "0.bias"]]


def test_a_frozen_factor_outside_of_the_groups_stays_outside() -> None:
    """LoRA-FA: only ``up`` trains."""
    model = nn.Sequential(nn.Linear(8, 8))
    dr.deflate(model, 4, layers="*")
    model[0].down.requires_grad_(False)
    optimizer = torch.optim.AdamW([model[0].up, model[0].bias])
    for form in (Adapted(2), FullRank(), Adapted(3), LowRank(2)):
        dr.apply_plan(model, {"0": form}, optimizer=optimizer, moments="reset")
        model(torch.randn(3, 8)).square().mean().backward()
        optimizer.step()
    assert names(model, optimizer) == [["0.up", "0.bias"]]


@pytest.mark.parametrize("decays", [(0.1, 0.0), (0.0, 0.1)], ids=str)
def test_moments_of_factors_in_two_groups_move(decays: tuple[float, float]) -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    dr.factorize(model, 3, layers="*")
    groups: list[dict[str, Any]] = [
        {"params": [p], "weight_decay": decay}
        for p, decay in zip([model[0].down, model[0].up], decays, strict=True)
    ]
    optimizer = torch.optim.SGD([*groups, {"params": [model[0].bias]}], lr=0.01, momentum=0.9)
    for _ in range(5):
        step(model, optimizer)
    dr.inflate(model, optimizer=optimizer)
    assert optimizer.state[model[0].weight]["momentum_buffer"].any()


def scheduled() -> tuple[nn.Sequential, Optimizer, dr.RankScheduler]:
    model, optimizer = two_groups(LowRank(3))
    schedule = dr.schedules.dynamic_rank(3, inflate=4, deflate=8)
    return model, optimizer, dr.RankScheduler(model, optimizer, schedule, 12)


def train(run: tuple[nn.Sequential, Optimizer, dr.RankScheduler], start: int, stop: int) -> None:
    model, optimizer, ranks = run
    for number in range(start, stop):
        torch.manual_seed(number)
        step(model, optimizer)
        ranks.step()


@pytest.mark.parametrize("stop", [2, 4, 6, 8, 10])
def test_a_run_with_factors_in_two_groups_resumes_bit_by_bit(stop: int) -> None:
    one, two = scheduled(), scheduled()
    train(one, 0, stop)
    saved = [copy.deepcopy(part.state_dict()) for part in one]
    for i in (2, 0, 1):  # structure first, then weights, then the optimizer
        two[i].load_state_dict(saved[i])
    for run in (one, two):
        train(run, stop, 12)
    pairs = zip(one[0].state_dict().values(), two[0].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
