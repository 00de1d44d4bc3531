"""The plain model with the same effective weights as a ranked one, and their comparison."""

from __future__ import annotations

import copy
from typing import Any

import torch
from laws import assert_close
from torch import Tensor, nn

from dynarank.layers import RankedLayer


def plain_twin(model: nn.Module) -> nn.Module:
    """A plain model with the same effective weights, written down without the library's verbs."""
    twin = copy.deepcopy(model)
    for module, own in zip(model.modules(), twin.modules(), strict=True):
        if not isinstance(module, RankedLayer):
            continue
        effective = {name: module.effective_weight(name).detach() for name in module.forms}
        own.__class__ = module.plain
        for name in [n for n, _ in own.named_parameters(recurse=False)]:
            if any(name.startswith(e) or "weight" in effective for e in effective):
                own._parameters.pop(name) if "bias" not in name else None
        for name, weight in effective.items():
            own._parameters[name] = nn.Parameter(weight.clone())
    assert not any(isinstance(m, RankedLayer) for m in twin.modules())
    return twin


def compare(model: nn.Module, plain: nn.Module, inputs: tuple[Tensor, ...], **named: Any) -> None:
    """Outputs, the inputs' gradients and those of the parameters that both have."""
    results = []
    for one in (model, plain):
        own = tuple(x.clone().requires_grad_() for x in inputs)
        torch.manual_seed(5)
        outputs = [y for y in as_tuple(one(*own, **named)) if y is not None]
        seeds = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
        torch.autograd.backward(outputs, seeds)
        results.append((outputs, [x.grad for x in own]))
    (mine, my_grads), (theirs, their_grads) = results
    for a, b in zip([*mine, *my_grads], [*theirs, *their_grads], strict=True):
        assert_close(a, b)
    expected = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if name in expected and p.requires_grad:
            assert_close(p.grad, expected[name].grad)


def as_tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)
