"""The output of a layer may be written to in place wherever that of the plain layer may."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from every_layer import KINDS, Kind
from laws import assert_close
from torch import Tensor, nn

import dynarank as dr
from dynarank.forms import Form

FORMS: list[Form] = [
    dr.LowRank(2, execution="factored"),
    dr.LowRank(2, execution="factored", recompute=True),
    dr.LowRank(2, execution="joined"),
    dr.Adapted(2, execution="two-branch"),
    dr.Adapted(2, execution="two-branch", recompute=True),
    dr.Adapted(2, execution="merged"),
    dr.Adapted(2, execution="merged", recompute=True),
]


def masked_(y: Tensor) -> Tensor:
    y[y > 0.1] = 0.5
    return y


WRITES: list[Callable[[Tensor], Tensor]] = [
    torch.relu_, masked_, lambda y: y[..., 0].mul_(2), lambda y: y.view(-1).add_(1)
]  # fmt: skip


def written(model: nn.Module, write: Callable[[Tensor], Tensor], x: tuple[Tensor, ...]) -> Tensor:
    y = model(*x)
    write(y)
    return y


def writable(kind: Kind, write: Callable[[Tensor], Tensor]) -> bool:
    try:
        written(kind.make(), write, kind.inputs()).sum().backward()
    except RuntimeError:  # the plain layer saves its output, or it is not contiguous
        return False
    return True


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_written_in_place_as_out_of_place(kind: Kind, form: Form) -> None:
    for write in filter(lambda w: writable(kind, w), WRITES):
        for input_grad in (True, False):
            model = kind.make()
            dr.apply_plan(model, dict.fromkeys(dr.current_plan(model), form))
            results: list[list[Tensor | None]] = []
            for copy in (False, True):
                x = kind.inputs()
                if input_grad and x[0].is_floating_point():
                    x = tuple(v.requires_grad_() for v in x)
                y = model(*x).clone() if copy else model(*x)
                write(y)
                model.zero_grad()
                y.square().sum().backward()
                results.append([y, *(v.grad for v in (*x, *model.parameters()))])
            for one, other in zip(*results, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert_close(one.detach(), other.detach(), 1e-6)
        with torch.no_grad():
            write(model(*kind.inputs()))


def test_unbatched_and_with_autocast() -> None:
    for layer, shape in ((nn.Conv2d(4, 8, 3), (4, 6, 6)), (nn.Linear(8, 8), (8,))):
        model = nn.Sequential(layer)
        dr.apply_plan(model, {"0": dr.Adapted(2, execution="merged")})
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(torch.randn(shape)).relu_().sum().backward()
