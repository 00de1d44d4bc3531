"""States of optimizers say of which forms and parameters they are."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_run import assert_same_bits, forms, net, train_step
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.surgery.optimizer_signature import KEY

Pair = tuple[nn.Sequential, Optimizer]


def trained(plan: Any = None, kind: type[Optimizer] = AdamW, steps: int = 3) -> Pair:
    model = net()
    optimizer = kind(model.parameters(), lr=0.01, **({"momentum": 0.9} if kind is SGD else {}))  # type: ignore[call-arg]
    dr.apply_plan(model, plan or {"0": LowRank(2), "2": LowRank(2)}, optimizer=optimizer)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {name: copy.deepcopy(optimizer.state.get(p)) for name, p in model.named_parameters()}


def test_a_state_says_of_which_forms_and_parameters_it_is() -> None:
    _, optimizer = trained({"0": LowRank(2), "2": FullRank(), "4": Adapted(1)})
    signed = optimizer.state_dict()[KEY]
    assert json.loads(json.dumps(signed)) == signed
    assert {path: form["form"] for path, form in signed["forms"].items()} == {
        "0": "low-rank",
        "4": "adapted",
    }
    assert signed["names"] == [
        ["0.down", "0.up", "0.bias", "2.weight", "2.bias", "4.down", "4.up", "4.bias"]
    ]


PLANS: list[dict[str, Any]] = [
    {"0": LowRank(2), "2": LowRank(2)},
    {"0": Adapted(2), "2": Adapted(2)},  # the same count and shapes as the first
    {"0": FullRank(), "2": LowRank(1), "4": Adapted(1, alpha=3.0)},
    {"0": LowRank(2, "cp")},
]


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("there", range(len(PLANS)))
@pytest.mark.parametrize("here", range(len(PLANS)))
def test_loading_brings_the_model_to_the_forms_of_the_state(
    here: int, there: int, kind: type[Optimizer]
) -> None:
    saved, run = trained(PLANS[there], kind), trained(PLANS[here], kind, steps=1)
    run[1].load_state_dict(copy.deepcopy(saved[1].state_dict()))
    assert forms(run[0]) == forms(saved[0])
    assert_same_bits(by_name(*run), by_name(*saved))
    run[0].load_state_dict(saved[0].state_dict())
    for one in (run, saved):
        train_step(*one, 3)
    assert_same_bits(run[0].state_dict(), saved[0].state_dict())


def in_groups(model: nn.Module, *groups: list[str]) -> Optimizer:
    own = dict(model.named_parameters())
    rates = [{"params": [own[n] for n in names], "lr": 10.0**-i} for i, names in enumerate(groups)]
    return AdamW(rates)


ROWS = (["0.weight", "0.bias"], ["2.weight", "2.bias", "4.weight", "4.bias"])


@pytest.mark.parametrize(
    "groups",
    [
        (["0.bias", "0.weight"], ["4.bias", "2.bias", "4.weight", "2.weight"]),
        (["4.weight", "2.weight", "2.bias", "4.bias"], ["0.weight", "0.bias"]),
    ],
    ids=["other order", "groups exchanged"],
)
def test_parameters_in_another_order_are_found_by_their_names(groups: Any) -> None:
    saved, run = net(), net()
    one, other = in_groups(saved, *ROWS), in_groups(run, *groups)
    for model, optimizer in ((saved, one), (run, other)):
        dr.apply_plan(model, {"0": LowRank(2)}, optimizer=optimizer)
    for step in range(3):
        train_step(saved, one, step)
    other.load_state_dict(one.state_dict())
    assert_same_bits(by_name(run, other), by_name(saved, one))
    rates = {id(p): g["lr"] for g in other.param_groups for p in g["params"]}
    assert [rates[id(p)] for p in run.parameters()] == [1.0] * 3 + [0.1] * 4


OTHERS: list[tuple[Any, str]] = [
    ((ROWS[0], ROWS[1][:-1]), "does not hold the parameter '4.bias', which the state has"),
    ((["0.weight"], ["0.bias", *ROWS[1]]), "in a group with"),
    (([*ROWS[0], *ROWS[1]],), "in a group with"),
]


@pytest.mark.parametrize(("groups", "message"), OTHERS)
def test_other_parameters_or_groups_are_refused_by_name(groups: Any, message: str) -> None:
    saved, run = net(), net()
    one, other = in_groups(saved, *ROWS), in_groups(run, *groups)
    for model, optimizer in ((saved, one), (run, other)):
        dr.apply_plan(model, {"0": LowRank(2)}, optimizer=optimizer)
    train_step(saved, one, 0)
    dr.inflate(saved, optimizer=one)
    before = str(other.state_dict()), forms(run)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(one.state_dict())
    assert (str(other.state_dict()), forms(run)) == before


def test_a_state_of_other_shapes_is_refused_with_the_name_and_both_shapes() -> None:
    saved, run = trained(), trained()
    state = saved[1].state_dict()
    state["state"][0]["exp_avg_sq"] = torch.zeros(3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'0.down' has the shape \(3, 6\).*\(2, 6\)"):
        run[1].load_state_dict(state)


@pytest.mark.parametrize(
    "damage", [{}, [], {"forms": {}, "names": []}, {"forms": {"0": 1}, "names": [[]]}, "x", 3]
)
def test_a_damaged_signature_is_refused_by_name(damage: Any) -> None:
    run = trained()
    before = str(run[1].state_dict())
    with pytest.raises(ValueError, match="the entry 'dynarank' of the optimizer's state"):
        run[1].load_state_dict({**run[1].state_dict(), KEY: damage})
    assert str(run[1].state_dict()) == before


def test_the_state_of_another_model_is_refused_by_the_layers_name() -> None:
    run = trained()
    state = run[1].state_dict()
    state[KEY]["forms"]["head"] = state[KEY]["forms"]["0"]
    with pytest.raises(ValueError, match=r"of another model: .*'head'"):
        run[1].load_state_dict(state)


def test_an_optimizer_that_nobody_passed_is_signed_from_its_first_step_on() -> None:
    model = dr.factorize(net(), 2)
    optimizer = AdamW(model.parameters())
    assert KEY not in optimizer.state_dict()
    train_step(model, optimizer, 0)
    assert KEY in optimizer.state_dict()
    other = nn.Linear(2, 2)
    unknown = SGD(other.parameters(), lr=0.1)
    unknown.step()
    assert KEY not in unknown.state_dict()


def test_the_base_of_an_adapter_may_be_in_the_groups_or_not() -> None:
    saved = trained({"0": Adapted(2), "2": Adapted(2)})
    model = dr.apply_plan(run := net(), {"0": Adapted(2), "2": Adapted(2)}) and run
    optimizer = AdamW(model.parameters(), lr=0.01)  # with the bases
    dr.apply_plan(model, {}, optimizer=optimizer)
    optimizer.load_state_dict(saved[1].state_dict())
    assert_same_bits(by_name(model, optimizer), by_name(*saved))
    saved[1].load_state_dict(optimizer.state_dict())


def test_after_merge_states_are_as_torch_makes_them() -> None:
    model, optimizer = trained()
    dr.merge(model, optimizer=optimizer)
    train_step(model, optimizer, 4)
    assert set(optimizer.state_dict()) == {"state", "param_groups"}


def test_optimizers_are_copied_and_pickled_with_their_models() -> None:
    pair = trained()
    for model, optimizer in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert not optimizer._optimizer_load_state_dict_pre_hooks
        train_step(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(pair[1].state_dict(), file)
    file.seek(0)
    assert_same_bits(torch.load(file, weights_only=True)[KEY], pair[1].state_dict()[KEY])


def test_a_wrapper_of_accelerate_is_signed_inside() -> None:
    saved = trained()
    model = net()
    optimizer = Accelerator(cpu=True).prepare(AdamW(model.parameters(), lr=0.01))
    dr.apply_plan(model, {"0": FullRank(), "2": LowRank(1)}, optimizer=optimizer)
    optimizer.load_state_dict(saved[1].state_dict())
    assert forms(model) == forms(saved[0])
    assert KEY in optimizer.state_dict()


def test_distributed_checkpoints_take_signed_optimizers() -> None:
    saved, run = trained(), trained(steps=0)
    state = copy.deepcopy(get_optimizer_state_dict(*saved))
    run[0].load_state_dict(saved[0].state_dict())
    set_optimizer_state_dict(*run, state)
    for one in (run, saved):
        train_step(*one, 3)
    assert_same_bits(run[0].state_dict(), saved[0].state_dict())


def test_lr_schedulers_go_on_over_a_load() -> None:
    saved, run = trained(), trained({"0": Adapted(2)})
    rates = StepLR(run[1], 1, 0.5)
    run[1].load_state_dict(copy.deepcopy(saved[1].state_dict()))
    train_step(*run, 3)
    rates.step()
    assert run[1].param_groups[0]["lr"] == 0.005


def test_users_hooks_of_all_optimizers_are_called_though_ours_end() -> None:
    """torch does not allow a hook to remove itself while others follow it."""
    seen: list[Optimizer] = []
    model, optimizer = trained(steps=0)
    hook = register_optimizer_step_pre_hook(lambda one, *_: seen.append(one))
    train_step(model, optimizer, 0)
    hook.remove()
    assert seen == [optimizer]
