"""Tracing and exporting leave nothing behind in a model, in any order."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from every_layer import FORMS, KINDS, Kind, in_form
from laws import assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dynarank as dr
from dynarank.cost.flops import trace
from dynarank.layers import RankedLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes.*_flat_weights:UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # torch's own layers warn too
]
Inputs = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def traced(model: nn.Module, x: Inputs) -> Tensor:
    return torch.jit.trace(model, x, check_trace=False)(*x)


def exported(model: nn.Module, x: Inputs) -> Tensor:
    return torch.export.export(model, x).module()(*x)


def compiled(model: nn.Module, x: Inputs) -> Tensor:
    return torch.compile(model, backend="eager")(*x)


def proxied(model: nn.Module, x: Inputs) -> Tensor:
    return make_fx(model, tracing_mode="real")(*x)(*x)


def symbolic(model: nn.Module, x: Inputs) -> Tensor:
    make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*x)
    return model(*x)


def faked(model: nn.Module, x: Inputs) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(*map(mode.from_tensor, x))
    return model(*x)


def on_meta(model: nn.Module, x: Inputs) -> Tensor:
    state = {n: p.to("meta") for n, p in model.named_parameters()}
    torch.func.functional_call(model, state, tuple(v.to("meta") for v in x))
    return model(*x)


WAYS: list[Callable[[nn.Module, Inputs], Tensor]] = [
    traced, exported, compiled, proxied, symbolic, faked, on_meta,
]  # fmt: skip


def remembered(model: nn.Module) -> list[object]:
    """All numbers that the layers keep of the calls so far."""
    kept = [m._executions.items() for m in model.modules() if isinstance(m, RankedLayer)]
    return [n for items in kept for key, how in items for n in (*_shape(key), how.flops.forward)]


def _shape(key: object) -> tuple[object, ...]:
    return next(tuple(getattr(part, "shape", part)) for part in key[2:])  # type: ignore[index]


@pytest.mark.parametrize("form", ["low-rank", "adapted"])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(WAYS, 2)))
def test_in_any_order(
    first: Callable[[nn.Module, Inputs], Tensor],
    second: Callable[[nn.Module, Inputs], Tensor],
    form: str,
) -> None:
    kind = KINDS[0]
    model, x = in_form(kind.make(), form).eval(), kind.inputs()
    with torch.no_grad():
        expected = model(*x)
        model.layer._executions.clear()
        for way in (first, second):
            assert_close(way(model, x), expected)
        assert all(type(n) is int for n in remembered(model))
        assert torch.equal(model(*x), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_layer_is_traced_then_exported(kind: Kind, form: str) -> None:
    model, x = in_form(kind.make(), form).eval(), kind.inputs()
    expected = model(*x)
    assert_close(traced(model, x), expected)
    assert all(type(n) is int for n in remembered(model))
    assert_close(exported(model, x), expected)
    assert torch.equal(model(*x), expected)


def test_a_trace_is_right_for_other_shapes_and_warns_of_nothing() -> None:
    model = in_form(KINDS[0].make(), "low-rank").eval()
    with pytest.warns() as caught:
        made = torch.jit.trace(model, torch.randn(3, 12))
    assert not [w for w in caught if issubclass(w.category, torch.jit.TracerWarning)]
    x = torch.randn(500, 12)
    assert_close(made(x), model(x))


def test_scripting_is_refused_by_name_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    dr.factorize(model, 2, layers="2")
    children = list(model)
    with pytest.raises(ValueError, match=r"torch\.jit\.script cannot compile RankedLinear.*merge"):
        torch.jit.script(model)
    assert all(a is b for a, b in zip(model, children, strict=True))
    torch.jit.script(dr.merge(model))


@pytest.mark.parametrize("form", ["low-rank", "adapted"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], KINDS[8]], ids=str)
def test_symbolic_tracing_without_shapes_is_refused_by_name(kind: Kind, form: str) -> None:
    model, x = nn.Sequential(in_form(kind.make(), form).layer), kind.inputs()
    expected = model(*x)
    with pytest.raises(ValueError, match=r"symbolic_trace knows no shapes.*torch\.export"):
        torch.fx.symbolic_trace(model)
    assert torch.equal(model(*x), expected)

    class Whole(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, RankedLayer) or super().is_leaf_module(m, module_qualified_name)

    assert torch.equal(torch.fx.GraphModule(model, Whole().trace(model))(*x), expected)


def test_a_model_that_torch_has_compiled_is_refused_by_name() -> None:
    x = torch.randn(2, 8)
    made = torch.jit.trace(nn.Sequential(nn.Linear(8, 8)), x)
    (site,) = dr.survey(made)
    assert "torch.jit" in site.obstacle
    with pytest.raises(ValueError, match=r"torch\.jit"):
        dr.factorize(made, 2)
    with pytest.raises(ValueError, match=r"TopLevelTracedModule.*torch\.jit\.trace"):
        trace(made, x)
