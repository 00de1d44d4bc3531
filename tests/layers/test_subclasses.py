"""Subclasses of handled layers: taken if they inherit their forward pass, else left by name."""

from __future__ import annotations

import copy
import pickle
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
from every_layer import FORMS, KINDS, Kind, in_form
from laws import assert_close
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from warm_python import run as python

import dynarank as dr
from dynarank.layers import RankedLayer, effective, ranked_class, registry
from dynarank.layers.linear import RankedLinear
from dynarank.layers.subclasses import overridden


class Mixin:
    """What a user's base class may add."""

    registry: ClassVar[list[type]] = []

    def __init_subclass__(cls, **_: Any) -> None:
        Mixin.registry.append(cls)

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.note = "mine"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, note={self.note}"  # type: ignore[misc]

    def described(self) -> str:
        return f"{self.note}: {type(self).__name__}"


OWN: dict[type[nn.Module], type[nn.Module]] = {}
for _kind in KINDS:
    _name = f"Own{_kind.plain.__name__}"
    OWN[_kind.plain] = globals()[_name] = type(
        _name, (Mixin, _kind.plain), {"__module__": __name__}
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_that_inherits_its_forward_pass_is_taken(kind: Kind, form: str) -> None:
    own, known = OWN[kind.plain], len(Mixin.registry)
    model, plain, x = kind.make(own), kind.make(), kind.inputs()
    assert all(not site.obstacle for site in dr.survey(model))
    in_form(model, form), in_form(plain, form)
    assert torch.equal(model(*x), plain(*x))
    layer = model.layer
    assert isinstance(layer, own) and isinstance(layer, RankedLayer)
    assert layer.described() == f"mine: Ranked{own.__name__}" and "note=mine" in layer.extra_repr()
    twins = (copy.deepcopy(model), copy.copy(layer), pickle.loads(pickle.dumps(model)))
    assert dr.current_plan(twins[0]) == dr.current_plan(twins[2]) == dr.current_plan(model)
    for twin in (twins[0], twins[2]):
        assert type(twin.layer) is type(layer)
        assert torch.equal(twin(*x), model(*x))
    before, keys = model(*x), vars(kind.make(own).layer).keys()
    for one in (model, twins[0], twins[2]):
        assert type(dr.merge(one).layer) is own and vars(one.layer).keys() == keys
        assert_close(one(*x), before)
    assert len(Mixin.registry) == known  # the user's own registry is not told of ranked classes


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Padded(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(nn.functional.pad(input, (1, 1)), weight, bias)


class Larger(nn.ConvTranspose2d):
    def _output_padding(self, *args: Any, **named: Any) -> list[int]:
        return [1, 1]


class Normalized(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.raw = self._parameters.pop("weight")

    @property
    def weight(self) -> Tensor:
        return self.raw / self.raw.norm()


class Called(nn.Linear):
    def __call__(self, input: Tensor) -> Tensor:
        return 2 * super().__call__(input)


class Stepped(nn.LSTM):
    def check_forward_args(self, *args: Any) -> None:
        pass


class Mixing(nn.MultiheadAttention):
    def forward(self, *args: Any, **named: Any) -> Any:
        return super().forward(*args, **named)


class Scaled(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Named(nn.Linear):
    """Uses a name that a ranked layer needs."""

    def effective_weight(self) -> Tensor:
        return self.weight


class Grandchild(Doubled):
    pass


class Mixed(Mixin, Doubled):
    pass


class Copied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Copied:
        return Copied(self.in_features, self.out_features)


class Slotted(nn.Linear):
    __slots__ = ("place",)


LEFT = [
    (Doubled(4, 4), "Doubled overrides forward of Linear"),
    (Grandchild(4, 4), "Grandchild overrides forward of Linear"),
    (Mixed(4, 4), "Mixed overrides forward of Linear"),
    (Padded(4, 4, 3), "Padded overrides _conv_forward of Conv2d"),
    (Larger(4, 4, 3), "Larger overrides _output_padding of ConvTranspose2d"),
    (Normalized(4, 4), "Normalized overrides weight of Linear"),
    (Called(4, 4), "Called overrides __call__ of Linear"),
    (Stepped(4, 4), "Stepped overrides check_forward_args of LSTM"),
    (Mixing(4, 2), "Mixing overrides forward of MultiheadAttention"),
    (Scaled(4, 4), "Scaled overrides forward of Conv1D"),
    (Named(4, 4), "Named overrides effective_weight of Linear"),
    (Copied(4, 4), "Copied overrides __deepcopy__ of Linear"),
    (Slotted(4, 4), "Slotted overrides __slots__ of Linear"),
]


@pytest.mark.parametrize(("layer", "reason"), LEFT, ids=lambda case: type(case).__name__)
def test_one_that_overrides_what_it_runs_by_is_left_by_name(layer: nn.Module, reason: str) -> None:
    kind, model = type(layer), nn.Sequential(layer)
    site = next(site for site in dr.survey(model) if site.module is layer)
    assert site.obstacle == f"its class {reason}"
    with pytest.raises(ValueError, match=reason):
        dr.factorize(model, 1, layers=site.path)
    if kind is not Mixing:  # its output projection is a layer of its own
        with pytest.raises(ValueError, match=f"no layer of the model can change form.*{reason}"):
            dr.factorize(model, 1)
    model = nn.Sequential(layer, nn.Linear(64, 64), nn.Linear(64, 64))
    assert type(dr.factorize(model, 1)[0]) is kind


def test_a_base_class_behind_the_layer_does_not_count() -> None:
    class Base(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            raise NotImplementedError

    class Behind(nn.Linear, Base):
        pass

    model = dr.factorize(nn.Sequential(Behind(8, 8)), 1, layers="0")
    assert isinstance(model[0], Behind) and model(torch.ones(2, 8)).shape == (2, 8)


def test_generic_and_abstract_classes_are_taken() -> None:
    item = TypeVar("item")

    class Described(ABC, Generic[item]):
        @abstractmethod
        def describe(self) -> item: ...

    class Concrete(nn.Linear, Described[str]):
        def describe(self) -> str:
            return "concrete"

    model = dr.factorize(nn.Sequential(Concrete(8, 8)), 1, layers="0")
    assert isinstance(model[0], Described) and model[0].describe() == "concrete"
    assert type(copy.deepcopy(model)[0]) is type(model[0])
    assert type(dr.merge(model)[0]) is Concrete


def test_a_reset_of_its_own_is_left_where_the_ranked_class_has_one() -> None:
    class Resets(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.orthogonal_(self.weight)

    class RankedResets(RankedLinear):
        def reset_parameters(self) -> None:
            """Factors need another one."""

    assert overridden(Resets, RankedLinear) == ()
    assert overridden(Resets, RankedResets) == ("reset_parameters",)


def test_a_materialized_lazy_layer_is_taken() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyConv1d(4, 2))
    assert all("lazy" in site.obstacle for site in dr.survey(model))
    model[0](torch.ones(2, 8)), model[1](torch.ones(2, 3, 8))
    dr.factorize(model, 1, layers="*")
    assert isinstance(model[0], RankedLinear)
    assert type(dr.merge(model)[0]) is nn.Linear


class Gated(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(input))


class RankedGated(RankedLayer, Gated):
    plain = Gated
    weight = effective("weight")  # type: ignore[assignment]
    specs = RankedLinear.specs

    def forward(self, input: Tensor) -> Tensor:
        return torch.sigmoid(self.multiply(self.resolved(), input, self.bias))


class OwnGated(Mixin, Gated):
    pass


@pytest.fixture
def registered() -> Iterator[None]:
    dr.layers.register_layer(Gated, RankedGated)
    yield
    del registry._RANKED[Gated]


@pytest.mark.usefixtures("registered")
def test_subclasses_of_a_registered_layer_are_included_and_can_be_registered_themselves() -> None:
    model, x = nn.Sequential(OwnGated(8, 8)), torch.randn(2, 8)
    dr.factorize(model, 8, layers="*")
    assert isinstance(model[0], RankedGated) and isinstance(model[0], OwnGated)
    before = model(x)
    assert type(dr.merge(model)[0]) is OwnGated
    assert_close(model(x), before)
    made = type("RankedOwnGated", (RankedGated, OwnGated), {"plain": OwnGated})
    dr.layers.register_layer(OwnGated, made)
    assert ranked_class(OwnGated) is made
    del registry._RANKED[OwnGated]


def test_torch_saves_one_for_another_process(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nclass Mine(nn.Linear):\n    pass\n", encoding="utf-8"
    )
    script = """
        import sys, torch, mine, dynarank as dr
        from torch import nn
        if sys.argv[1] == "save":
            model = dr.factorize(nn.Sequential(mine.Mine(8, 8)), 2, layers="*")
            torch.save(model, "model.pt")
            torch.save(model(torch.ones(8)), "output.pt")
        else:
            model = torch.load("model.pt", weights_only=False)
            assert torch.equal(model(torch.ones(8)), torch.load("output.pt"))
            assert isinstance(model[0], mine.Mine) and model[0].form == dr.LowRank(2)
            assert type(dr.merge(model)[0]) is mine.Mine
    """
    for verb in ("save", "load"):
        python(["-c", textwrap.dedent(script), verb], cwd=tmp_path, check=True)
