"""A layer of one's own: a ranked class in the registry, and every verb knows it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from laws import assert_close, forms, randomize
from torch import Tensor, nn

import dynarank as dr
from dynarank import FullRank, LowRank
from dynarank.cost.flops import count_flops, trace
from dynarank.forms import Form
from dynarank.layers import RankedLayer, WeightSpec, effective, ranked_class, registry
from dynarank.layers.linear import RankedLinear


class Gated(nn.Module):
    """``y = sigmoid(gate) * (x W)``, with W stored as (in, out)."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.ins, self.outs = ins, outs
        self.table = nn.Parameter(torch.randn(ins, outs) / ins**0.5)
        self.gate = nn.Parameter(torch.zeros(outs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate) * (x @ self.table)


class RankedGated(RankedLayer, Gated):
    plain = Gated
    table = effective("table")  # type: ignore[assignment]

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        return (WeightSpec("table", (module.outs, module.ins), swapped=True),)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate) * self.multiply(self.resolved("table"), x)


class Plain(nn.Module):
    """``y = x W``, which knows its sizes from its weight alone."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outs, ins) / ins**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class RankedPlain(RankedLayer, Plain):
    plain = Plain
    weight = effective("weight")  # type: ignore[assignment]

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        return (WeightSpec("weight", tuple(module.weight.shape)),)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.resolved(), x)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    dr.layers.register_layer(Gated, RankedGated)
    dr.layers.register_layer(Plain, RankedPlain)
    yield
    del registry._RANKED[Gated], registry._RANKED[Plain]


def build() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(Gated(12, 10)).double(), torch.randn(3, 12, dtype=torch.float64)


@pytest.mark.parametrize("form", forms("svd")[1:], ids=str)
def test_it_changes_form_and_keeps_its_function(form: Form) -> None:
    model, x = build()
    use = trace(model, x)
    dr.apply_plan(model, {"0.table": form})
    assert count_flops(model, x) == use.flops({"0.table": form})
    randomize(model)
    before = model(x)
    before.sum().backward()
    layer = model[0]
    assert isinstance(layer, Gated) and layer.table.shape == (12, 10)
    assert_close(torch.sigmoid(layer.gate) * (x @ layer.table), before)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert dr.current_plan(twin) == {"0.table": form}
        assert torch.equal(twin(x), before)
    assert type(dr.merge(model)[0]) is Gated
    assert_close(model(x), before)
    assert set(vars(model[0])) == set(vars(Gated(2, 2)))  # nothing is left of the forms


@pytest.mark.parametrize("form", forms("svd")[1:], ids=str)
def test_specs_may_read_the_weight(form: Form) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Plain(12, 10)).double(), torch.randn(3, 12, dtype=torch.float64)
    for after in (form, LowRank(2), dr.Adapted(4), FullRank(), form):
        dr.apply_plan(model, {"0": after})
        assert count_flops(model, x) == trace(model, x).flops({"0": after})
        before = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert dr.current_plan(twin) == {"0": after}
            assert torch.equal(twin(x), before)
            assert_close(dr.merge(twin)(x), before)
    assert type(dr.merge(model)[0]) is Plain
    assert set(vars(model[0])) == set(vars(Plain(2, 2)))


def test_only_the_layer_writes_its_forms() -> None:
    model, _ = build()
    dr.factorize(model, 2, layers="0.table")
    dr.inflate(model)
    layer = model[0]
    assert isinstance(layer, RankedGated)
    assert layer.forms == {"table": FullRank()}
    assert layer.last_factored_forms == {"table": LowRank(2)}
    assert RankedGated.from_plain(layer) is layer
    shell = layer.plain_like()
    assert type(shell) is Gated and type(layer) is RankedGated and shell.table is layer.table
    assert not hasattr(shell, "forms")


def test_names_and_decomposition_are_looked_up_once_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build()
    dr.factorize(model, 2, layers="0.table")
    model(x)

    def refuse(*_: object) -> None:
        raise AssertionError("looked up in a forward pass")

    monkeypatch.setattr("dynarank.layers.weight.get_decomposition", refuse)
    monkeypatch.setattr(WeightSpec, "parameter_names", refuse)
    model(x)


class NoPlain(RankedLayer, Gated):
    pass


class NotDerived(RankedLayer):
    plain = Gated


class WrongOrder(Gated, RankedLayer):
    plain = Gated


class NoSpecs(RankedLayer, nn.Bilinear):
    plain = nn.Bilinear


@pytest.mark.parametrize(
    ("plain", "ranked", "message"),
    [
        (Gated, RankedGated, "Gated has a ranked class already, RankedGated"),
        (nn.Linear, RankedLinear, "Linear has a ranked class already"),
        (Gated, NoPlain, r"`class NoPlain\(RankedLayer, Gated\)` with `plain = Gated`"),
        (Gated, NotDerived, "declare it as"),
        (nn.Bilinear, RankedGated, "with `plain = Bilinear`"),
        (Gated, WrongOrder, "wrong order"),
        (nn.Bilinear, NoSpecs, "must define specs"),
        (RankedGated, RankedGated, "a ranked class itself"),
        (Gated, Gated, "a subclass of RankedLayer"),
        (Gated(2, 2), RankedGated, "a module's class"),
    ],
)
def test_what_cannot_be_registered(plain: object, ranked: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dr.layers.register_layer(plain, ranked)  # type: ignore[arg-type]


def test_a_class_is_known_by_itself_not_by_its_name() -> None:
    linear = type("Linear", (nn.Module,), {"__module__": "torch.nn.modules.linear"})
    assert ranked_class(nn.Linear) is RankedLinear
    assert ranked_class(linear) is None
    assert ranked_class(RankedGated) is RankedGated
    assert ranked_class(nn.Bilinear) is None
