"""Derivatives of every kind, by ``torch.func``, forward mode and autograd, are the weight's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from covering import over
from every_layer import KINDS, Kind
from laws import assert_close
from torch import Tensor, func, nn
from torch.autograd import forward_ad, functional

import dynarank as dr
from dynarank import Adapted, LowRank
from dynarank.forms import Form
from dynarank.layers import merged
from dynarank.surgery.sites import survey

# Torch scripts a decomposition when forward mode first needs one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

Tensors = dict[str, Tensor]
Loss = Callable[[Tensors], Tensor]

FORMS: list[Form] = [
    *(Adapted(2, d, alpha=3.0, execution="merged") for d in ("svd", "tucker", "cp", "separable")),
    Adapted(2, alpha=3.0, execution="merged", recompute=True),
    Adapted(2, alpha=3.0, execution="two-branch", recompute=True),
    LowRank(2, execution="factored", recompute=True),
    LowRank(2, execution="joined"),
]
# Torch transforms none of its fused recurrent kernels.
FUSED = nn.RNNBase, nn.LSTMCell, nn.GRUCell
TRANSFORMED = [kind for kind in KINDS if not issubclass(kind.plain, FUSED)]


def flat(tensors: Any) -> Tensor:
    parts = tensors.values() if isinstance(tensors, dict) else tensors
    return torch.cat([part.reshape(-1) for part in parts])


def direction(tensors: Tensors) -> Tensors:
    return {k: torch.arange(v.numel()).to(v).cos().view_as(v) for k, v in tensors.items()}


def squared_gradients(loss: Loss) -> Loss:
    return lambda tensors: flat(func.grad(loss)(tensors)).square().sum()


def dual_numbers(loss: Loss, tensors: Tensors) -> Tensor:
    tangents = direction(tensors)
    with forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(v, tangents[k]) for k, v in tensors.items()}
        return cast(Tensor, forward_ad.unpack_dual(loss(duals)).tangent)


def double_backward(loss: Loss, tensors: Tensors) -> Tensor:
    own = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    first = torch.autograd.grad(loss(own), tuple(own.values()), create_graph=True)
    return flat(torch.autograd.grad(flat(first).square().sum(), tuple(own.values())))


def of_values(loss: Loss, tensors: Tensors) -> Callable[..., Tensor]:
    """The loss as ``torch.autograd.functional`` takes it, twice."""
    return lambda *values: torch.stack([loss(dict(zip(tensors, values, strict=True)))] * 2)


def jacobian(loss: Loss, tensors: Tensors, strategy: str) -> Tensor:
    values, options = tuple(tensors.values()), {"vectorize": True, "strategy": strategy}
    return flat(functional.jacobian(of_values(loss, tensors), values, **options))  # type: ignore[arg-type]


def hessian_product(loss: Loss, tensors: Tensors) -> Tensor:
    values, along = tuple(tensors.values()), tuple(direction(tensors).values())
    summed = lambda *own: of_values(loss, tensors)(*own).sum()  # noqa: E731
    return flat(functional.hvp(summed, values, along)[1])


FORWARD: dict[str, Callable[[Loss, Tensors], Tensor]] = {
    "jvp": lambda loss, t: func.jvp(loss, (t,), (direction(t),))[1],
    "jacfwd": lambda loss, t: flat(func.jacfwd(loss)(t)),
    "jvp of grad": lambda loss, t: flat(func.jvp(func.grad(loss), (t,), (direction(t),))[1]),
    "dual numbers": dual_numbers,
    "jacobian, forward": lambda loss, t: jacobian(loss, t, "forward-mode"),
}
REVERSE: dict[str, Callable[[Loss, Tensors], Tensor]] = {
    "grad": lambda loss, t: flat(func.grad(loss)(t)),
    "jacrev": lambda loss, t: flat(func.jacrev(loss)(t)),
    "grad of grad": lambda loss, t: flat(func.grad(squared_gradients(loss))(t)),
    "grad of each": lambda loss, t: flat(func.vmap(func.grad(loss))(ensemble(t))),
    "ensemble": lambda loss, t: func.vmap(loss)(ensemble(t)),
}
AUTOGRAD: dict[str, Callable[[Loss, Tensors], Tensor]] = {
    "double backward": double_backward,
    "hessian product": hessian_product,
    "jacobian, reverse": lambda loss, t: jacobian(loss, t, "reverse-mode"),
}


def ensemble(tensors: Tensors) -> Tensors:
    return {k: torch.stack([v, 1.1 * v, v - 0.1]) for k, v in tensors.items()}


def in_form(kind: Kind, form: Form) -> nn.Module:
    model = kind.make().double()
    dr.apply_plan(model, {site.path: form for site in survey(model)})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def whole_weights(model: nn.Module, tensors: Tensors) -> Tensors:
    """The plain layer's parameters, each weight ``base + scale * join(factors)``."""
    found = dict(tensors)
    paths = {module: path for path, module in model.named_modules()}
    for site in survey(model):
        spec, form, prefix = site.spec, site.form, paths[site.module]
        assert isinstance(form, LowRank | Adapted)
        own = {name: found.pop(f"{prefix}.{name}") for name in spec.parameter_names(form)}
        weight = spec.from_canonical(spec.decomposition(form).join(spec.factors(form, own)))
        if isinstance(form, Adapted):
            weight = next(iter(own.values())) + form.scale * weight
        found[f"{prefix}.{spec.name}"] = weight
    return found


def both_losses(kind: Kind, form: Form, base: bool) -> tuple[Loss, Loss, Tensors]:
    """Of the model in the form and of the plain one; and what they are differentiated by."""
    model, plain = in_form(kind, form), kind.make().double()
    inputs = [x.double() if x.is_floating_point() else x for x in kind.inputs()]
    every = {name: p.detach() for name, p in model.named_parameters()}
    varied = {name: p for name, p in every.items() if base or not name.endswith("base")}

    def loss(tensors: Tensors) -> Tensor:
        return func.functional_call(model, {**every, **tensors}, tuple(inputs)).square().mean()

    def expected(tensors: Tensors) -> Tensor:
        whole = whole_weights(model, {**every, **tensors})
        return func.functional_call(plain, whole, tuple(inputs)).square().mean()

    return loss, expected, varied


def check(kind: Kind, form: Form, derivative: Any, base: bool) -> None:
    torch.manual_seed(0)
    loss, expected, tensors = both_losses(kind, form, base)
    assert_close(derivative(loss, tensors), derivative(expected, tensors))


@over({"kind": TRANSFORMED, "form": FORMS, "name": [*FORWARD, *REVERSE]})
def test_what_torch_func_and_forward_mode_give(kind: Kind, form: Form, name: str) -> None:
    """With respect to the base too, which is asked for here."""
    check(kind, form, {**FORWARD, **REVERSE}[name], base=True)


@over({"kind": KINDS, "form": FORMS, "name": [*AUTOGRAD]})
def test_what_autograd_gives(kind: Kind, form: Form, name: str) -> None:
    check(kind, form, AUTOGRAD[name], base=False)


@pytest.mark.parametrize("name", AUTOGRAD)
@pytest.mark.parametrize("kind", [k for k in KINDS if k.plain in (nn.Linear, nn.Conv2d)], ids=str)
def test_by_the_whole_gradient_too(kind: Kind, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors' gradients from the weight's, which other shapes would choose."""
    monkeypatch.setattr(merged, "_gradients", by_the_whole_gradient)
    check(kind, FORMS[0], AUTOGRAD[name], base=False)


def by_the_whole_gradient(x: Tensor, dy: Tensor, base: Tensor, *rest: Any) -> Any:
    return merged._projected(x, dy, dy.new_empty(base.shape), *rest)


@pytest.mark.parametrize("name", ["grad", "jvp"])
def test_compiled_they_are_the_same(name: str) -> None:
    kind = next(kind for kind in KINDS if kind.plain is nn.Linear)
    loss, _, tensors = both_losses(kind, FORMS[0], base=True)
    derivative = lambda t: {**FORWARD, **REVERSE}[name](loss, t)  # noqa: E731
    torch.compiler.reset()
    compiled = torch.compile(derivative, backend="aot_eager", fullgraph=True)
    assert_close(compiled(tensors), derivative(tensors))
