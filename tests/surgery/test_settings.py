"""What new parameters take over: whether they train, attributes, class, shared memory, format."""

from __future__ import annotations

import copy

import pytest
import torch
from covering import over
from laws import DECOMPOSITIONS
from torch import nn
from torch.nn import Parameter

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.forms import Form


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("start", [LowRank(3), Adapted(3)], ids=str)
def test_a_frozen_factor_stays_frozen(start: Form, decomposition: str) -> None:
    """In a form that has it, also after one that has not; and others train."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3))
    start = type(start)(3, decomposition)
    dr.apply_plan(model, {"0": start})
    first = next(n for n, p in model[0].named_parameters() if p.requires_grad and n != "bias")
    getattr(model[0], first).requires_grad_(False)
    kept = {f"0.{first}"}
    for form in (
        LowRank(2, decomposition),
        Adapted(2, decomposition),
        Adapted(2, decomposition, restart=1),
    ):
        dr.apply_plan(model, {"0": form})
        assert frozen(model) - {"0.base"} == kept
    dr.inflate(model)
    assert not frozen(model)
    dr.deflate(copy.deepcopy(model))
    dr.deflate(model)
    assert frozen(model) - {"0.base"} == kept
    getattr(model[0], first).requires_grad_(True)
    dr.deflate(dr.inflate(model), to="low-rank")
    assert not frozen(model)


def test_a_weight_unfrozen_while_full_rank_has_factors_that_train() -> None:
    model = dr.factorize(nn.Sequential(nn.Linear(8, 8)), 2)
    model[0].requires_grad_(False)
    dr.inflate(model)
    assert frozen(model) == {"0.weight", "0.bias"}
    model[0].weight.requires_grad_(True)
    assert frozen(dr.deflate(model, to="low-rank")) == {"0.bias"}


def test_frozen_factors_of_another_decomposition_freeze_no_weight() -> None:
    model = dr.factorize(nn.Sequential(nn.Conv2d(6, 8, 3)), 2, decomposition="tucker")
    model[0].down.requires_grad_(False)
    model[0].up.requires_grad_(False)
    dr.apply_plan(model, {"0": LowRank(2)})
    assert not frozen(model)


@pytest.mark.parametrize("form", [LowRank(2), Adapted(2), LowRank(2, "separable")], ids=str)
def test_attributes_are_kept(form: Form) -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.LSTM(6, 8))
    weights = {"0": model[0].weight, "1.weight_hh_l0": model[1].weight_hh_l0}
    for path, weight in weights.items():
        weight.no_weight_decay, weight.path = True, path
    dr.apply_plan(model, dict.fromkeys(weights, form))
    new = {n: p for n, p in model.named_parameters() if "bias" not in n and "ih" not in n}
    assert {(p.no_weight_decay, p.path) for p in new.values()} == {(True, one) for one in weights}
    for n, p in new.items():
        p.own = n
    for other in (Adapted(3), LowRank(3)):
        dr.apply_plan(model, dict.fromkeys(weights, other))
        assert all(
            p.own == n for n, p in model.named_parameters() if n in new and hasattr(p, "own")
        )
    dr.merge(model)
    assert model[0].weight.path == "0" and model[0].weight.own.startswith("0.")


def test_an_attribute_with_a_value_for_each_entry_is_dropped_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    model[0].weight.importance = torch.ones(6, 8)
    model[0].weight.scale = torch.ones(())
    with pytest.warns(RuntimeWarning, match=r"layer '0': the attribute 'importance' .* is dropped"):
        dr.deflate(model, 2, layers="*")
    assert not hasattr(model[0].up, "importance")
    assert model[0].up.scale is model[0].down.scale
    assert model[0].base.importance.shape == (6, 8)


class Tagged(Parameter):
    pass


def test_a_parameter_keeps_its_class() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = Tagged(model[0].weight.detach())
    dr.deflate(model, 2, layers="*")
    assert {n: type(p) for n, p in model.named_parameters() if n != "0.bias"} == {
        "0.base": Tagged, "0.down": Tagged, "0.up": Tagged
    }  # fmt: skip
    assert type(dr.merge(model)[0].weight) is Tagged


def test_shared_memory_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 3)).share_memory()
    for change in (dr.factorize, dr.deflate):
        change(model, 2, layers="*")
        assert all(p.is_shared() for p in model.parameters())
        dr.inflate(model)
        assert all(p.is_shared() for p in model.parameters())
    assert not dr.factorize(nn.Sequential(nn.Linear(8, 8)), 2)[0].up.is_shared()


CONVOLUTIONS = {
    "3 x 3": (nn.Conv2d, 3),
    "1 x 5": (nn.Conv2d, (1, 5)),
    "1 x 1": (nn.Conv2d, 1),
    "3 x 3 x 3": (nn.Conv3d, 3),
    "1 x 1 x 3": (nn.Conv3d, (1, 1, 3)),
}


@over({
    "kernel": CONVOLUTIONS,
    "adapted": [True, False],
    "decomposition": DECOMPOSITIONS,
    "groups": [1, 4],
    "last": [True, False],
})  # fmt: skip
def test_the_memory_format_survives_every_form(
    kernel: str, adapted: bool, decomposition: str, groups: int, last: bool
) -> None:
    """Strides of sides of 1 too, by which torch tells the format of a 1 x 1 kernel."""
    make, size = CONVOLUTIONS[kernel]
    model = nn.Sequential(make(4, 8, size, groups=groups))
    if last:
        formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
        model = model.to(memory_format=formats[make])
    optimizer, strides = step_once(model), model[0].weight.stride()
    kind = Adapted if adapted else LowRank
    for form in (kind(1, decomposition), FullRank()):
        dr.apply_plan(model, {"0": form}, optimizer=optimizer)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    assert model[0].weight.stride() == momentum.stride() == strides


def step_once(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_the_default_device_and_dtype_change_nothing(decomposition: str) -> None:
    """What was made on the default device by mistake would be a meta tensor."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 6, 2))
    optimizer, own = step_once(model), decomposition
    forms = [LowRank(2, own), LowRank(3, own), FullRank(), Adapted(2, own)]
    torch.set_default_dtype(torch.float64)
    try:
        for form in forms:
            with torch.device("meta"):
                dr.apply_plan(model, {"0": form, "2": form}, optimizer=optimizer)
            moments = [state["momentum_buffer"] for state in optimizer.state.values()]
            tensors = [*model.parameters(), *moments]
            assert {(t.device.type, t.dtype) for t in tensors} == {("cpu", torch.float32)}
    finally:
        torch.set_default_dtype(torch.float32)
