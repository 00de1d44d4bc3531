"""Adapters of another dtype than their base: fp32 ones on a bf16 model, and the reverse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynarank as dr
from dynarank.surgery.sites import survey

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(32, 24), lambda: torch.randn(3, 32)),
    "conv": (lambda: nn.Conv2d(32, 24, 3), lambda: torch.randn(2, 32, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(32, 24, 3), lambda: torch.randn(2, 32, 5)),
    "embedding": (lambda: nn.Embedding(32, 24), lambda: torch.randint(0, 32, (3,))),
    "lstm": (lambda: nn.LSTM(32, 24), lambda: torch.randn(4, 2, 32)),
    "cell": (lambda: nn.GRUCell(32, 24), lambda: torch.randn(2, 32)),
    "attention": (lambda: nn.MultiheadAttention(32, 4), lambda: torch.randn(4, 2, 32)),
}
DTYPES = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]


def output(model: nn.Module, x: Tensor) -> Tensor:
    y: Any = model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("execution", ["auto", "merged", "two-branch"])
@pytest.mark.parametrize(("base", "own"), DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapter_may_have_another_dtype_than_its_base(
    kind: str, base: torch.dtype, own: torch.dtype, execution: Any
) -> None:
    torch.manual_seed(0)
    make, inputs = LAYERS[kind]
    model, x = make(), inputs()
    dr.deflate(model, 4, layers="*", execution=execution)
    for factor in (f for site in survey(model) for f in site.factors()):
        factor.data.normal_(std=0.1)
    expected, weights = output(copy.deepcopy(model), x), [s.effective() for s in survey(model)]
    model = model.to(base)
    for factor in (f for site in survey(model) for f in site.factors()):
        factor.data = factor.data.to(own)
    x = x.to(base) if x.is_floating_point() else x
    y = output(model, x)
    assert y.dtype == base
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)
    for site, weight in zip(survey(model), weights, strict=True):
        assert site.effective().dtype == base
        torch.testing.assert_close(site.effective().float(), weight, atol=0.01, rtol=0.01)
    y.float().sum().backward()
    assert {f.grad.dtype for s in survey(model) for f in s.factors() if f.grad is not None} == {own}
