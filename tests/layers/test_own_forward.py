"""A ``forward`` set on a module itself follows a change of class, or the change is refused."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from every_layer import FORMS, KINDS, Kind, in_form
from laws import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dynarank as dr
from dynarank.layers.own_forward import set_class

Forward = Callable[..., Any]


def by_accelerate(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())


def by_two_hooks(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())
    add_hook_to_module(module, ModelHook(), append=True)


def by_a_removed_hook(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())
    remove_hook_from_module(module)


def by_itself(module: nn.Module) -> None:
    module.forward = module.forward


def by_a_closure(module: nn.Module) -> None:
    inner = module.forward
    module.forward = lambda *args: inner(*args)


def by_a_default(module: nn.Module) -> None:
    module.forward = lambda *args, inner=module.forward: inner(*args)


def by_a_positional_default(module: nn.Module) -> None:
    def forward(x: Any = None, y: Any = None, z: Any = None, inner: Any = module.forward) -> Any:
        return inner(*(v for v in (x, y, z) if v is not None))

    module.forward = forward


def by_wraps(module: nn.Module) -> None:
    def logged(function: Forward) -> Forward:
        @functools.wraps(function)
        def forward(*args: Any, **named: Any) -> Any:
            return function(*args, **named)

        return forward

    module.forward = logged(logged(module.forward))


def by_checkpoint(module: nn.Module) -> None:
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def by_autocast(module: nn.Module) -> None:
    module.forward = torch.autocast("cpu", torch.bfloat16, enabled=False)(module.forward)


def by_a_kept_method(module: nn.Module) -> None:
    module._plain_forward = module.forward  # type: ignore[assignment]
    module.forward = types.MethodType(lambda self, *args: self._plain_forward(*args), module)


def by_a_name(module: nn.Module) -> None:
    module._plain_forward = module.forward  # type: ignore[assignment]
    module.forward = lambda *args: getattr(module, "_plain_forward")(*args)  # noqa: B009


def by_fairscale(module: nn.Module) -> None:
    def checkpointed(original: Forward, module: Any, *args: Any) -> Any:
        return original(module(), *args)

    module.forward = functools.partial(checkpointed, type(module).forward, weakref.ref(module))


class Counter:
    """An object that wraps a function; what it counts must go on."""

    def __init__(self, inner: Forward) -> None:
        self.inner, self.calls = inner, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.inner(*args)

    def call(self, *args: Any) -> Any:
        return self(*args)


def by_an_object(module: nn.Module) -> None:
    module.forward = Counter(module.forward)


def by_a_method_of_an_object(module: nn.Module) -> None:
    module.forward = Counter(module.forward).call


FOLLOWING = [
    by_accelerate, by_two_hooks, by_a_removed_hook, by_itself, by_a_closure, by_a_default,
    by_a_positional_default, by_wraps, by_checkpoint, by_autocast, by_a_kept_method, by_a_name,
    by_fairscale, by_an_object, by_a_method_of_an_object,
]  # fmt: skip


def flops(model: nn.Module, *x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*x)
    return counter.get_total_flops()


@pytest.mark.parametrize("wrap", FOLLOWING, ids=lambda f: f.__name__)
def test_set_before_and_after_the_change(wrap: Callable[[nn.Module], None]) -> None:
    for before in (True, False):
        model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64)
        if before:
            wrap(model[0])
        dr.factorize(model, 4, layers="*")
        if not before:
            wrap(model[0])
        assert flops(model, x) == 2 * 8 * 4 * (64 + 64)
        assert flops(dr.inflate(model), x) == 2 * 8 * 64 * 64
        expected = model(x)
        assert type(dr.merge(model)[0]) is nn.Linear
        assert torch.equal(model(x), expected)
        dr.factorize(model, 4, layers="*")
        assert flops(model, x) == 2 * 8 * 4 * (64 + 64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_layer_with_a_hook(kind: Kind, form: str) -> None:
    plain, model, x = kind.make(), kind.make(), kind.inputs()
    add_hook_to_module(model.layer, ModelHook())
    in_form(plain, form), in_form(model, form)
    assert torch.equal(model(*x), plain(*x)) and flops(model, *x) == flops(plain, *x)
    twin = copy.deepcopy(model)
    before = model(*x)
    for one in (model, twin):
        assert type(dr.merge(one).layer) is kind.plain
        assert_close(one(*x), before)


def test_a_wrapper_goes_on_as_the_same_object() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    counter = model[0].forward = Counter(model[0].forward)  # type: ignore[assignment]
    model(x)
    dr.factorize(model, 2, layers="*")
    model(x)
    dr.merge(model)
    model(x)
    assert model[0].forward is counter and counter.calls == 3


def test_compiled_calls_and_forward_passes() -> None:
    for compile in (
        lambda layer: layer.compile(backend="eager"),
        lambda layer: setattr(layer, "forward", torch.compile(layer.forward, backend="eager")),
    ):
        model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
        compile(model[0])
        model(x)
        for change in (*FORMS.values(), dr.merge):
            change(model)
            layer = model[0]
            assert_close(model(x), F.linear(x, layer.weight, layer.bias))


class Tuned(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, Tuned])
def test_a_parent_that_reads_the_weight(kind: type[nn.MultiheadAttention]) -> None:
    model, x = nn.ModuleDict({"a": kind(12, 3)}).eval(), torch.randn(4, 2, 12)
    add_hook_to_module(model["a"], ModelHook())
    dr.factorize(model, 2, layers="a.out_proj")
    with FlopCounterMode(display=False) as counter:
        y = model["a"](x, x, x, need_weights=False)[0]
    assert counter.get_total_flops() < flops(nn.MultiheadAttention(12, 3), x, x, x)
    assert type(dr.merge(model)["a"]) is kind
    assert_close(model["a"](x, x, x)[0], y)
    model["a"].forward = lambda *args: nn.MultiheadAttention.forward(model["a"], *args)
    with pytest.raises(ValueError, match=r"a\.out_proj.*it is part of, its own forward"):
        dr.factorize(model, 2, layers="a.out_proj")


def own_arithmetic(module: nn.Module) -> None:
    module.forward = lambda x: 2 * F.linear(x, module.weight)  # type: ignore[arg-type]


def of_the_class(module: nn.Module) -> None:
    module.forward = lambda x: nn.Linear.forward(module, x)  # type: ignore[arg-type]


def of_another_module(module: nn.Module) -> None:
    module.forward = nn.Linear(8, 8).forward


def wrapped_in_name_only(module: nn.Module) -> None:
    module.forward = functools.wraps(module.forward)(lambda x: F.linear(x, module.weight))  # type: ignore[arg-type]


def cached(module: nn.Module) -> None:
    module.forward = functools.lru_cache(module.forward)


def by_a_shared_wrapper(module: nn.Module) -> None:
    def wrap(function: Forward) -> Forward:
        return lambda self, x: function(self, x)

    module.forward = types.MethodType(wrap(nn.Linear.forward), module)


STAYING = [
    own_arithmetic, of_the_class, of_another_module, wrapped_in_name_only, cached,
    by_a_shared_wrapper,
]  # fmt: skip


@pytest.mark.parametrize("wrap", STAYING, ids=lambda f: f.__name__)
def test_what_does_not_follow_is_refused_by_name(wrap: Callable[[nn.Module], None]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    wrap(model[0])
    forward, states = model[0].forward, copy.copy(vars(model[0]))
    (site, _) = dr.survey(model)
    assert site.form is None and "its own forward" in site.obstacle
    with pytest.raises(ValueError, match=r"'0': its own forward.*del module\.forward"):
        dr.factorize(model, 2, layers="*")
    assert type(model[0]) is type(model[1]) is nn.Linear
    assert vars(model[0]) == states and model[0].forward is forward
    del model[0].forward
    dr.factorize(model, 2, layers="*")
    wrap(model[0])
    dr.inflate(model)  # the class stays
    kinds, forward = [type(m) for m in model], model[0].forward
    with pytest.raises(ValueError, match="'0' cannot become a plain layer: its own forward"):
        dr.merge(model)
    assert [type(m) for m in model] == kinds and model[0].forward is forward


@pytest.mark.parametrize("wrap", FOLLOWING, ids=lambda f: f.__name__)
def test_a_change_that_fails_gives_the_methods_back(
    wrap: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    wrap(model[0])
    before, forward = model(x), model[0].forward

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr("dynarank.layers.ranked.RankedLayer.set_form", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        dr.factorize(model, 2, layers="*")
    assert type(model[0]) is nn.Linear and model[0].forward is forward
    assert torch.equal(model(x), before)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_model_prepared_by_accelerate_changes_form() -> None:
    """Its root has a forward pass of its own; the class of the root does not change."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(4, 64)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    full = flops(prepared, x)
    assert flops(dr.factorize(prepared, 4, layers="*"), x) < full / 4
    y = dr.inflate(prepared)(x)
    assert_close(dr.merge(prepared)(x), y)


def test_the_inverse_undoes_it() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = functools.partial(lambda f, x: f(x), layer.forward)

    class Other(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    x, before = torch.ones(4), layer(torch.ones(4))
    set_class(layer, Other)
    assert torch.equal(layer(x), before + 1)
    set_class(layer, nn.Linear)
    assert torch.equal(layer(x), before)
