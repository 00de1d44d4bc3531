"""Weights whose numbers cannot be computed with are left, and the reason is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dynarank as dr

DTYPES = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64, torch.float8_e8m0fnu,
]  # fmt: skip


def with_weight(layer: nn.Module, name: str, weight: Tensor) -> nn.Module:
    layer._parameters[name] = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Linear(64, 64), "weight"),
        (lambda: nn.Conv2d(8, 8, 3), "weight"),
        (lambda: nn.Embedding(64, 64), "weight"),
        (lambda: nn.LSTMCell(8, 8), "weight_ih"),
        (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight"),
    ],
    ids=["Linear", "Conv2d", "Embedding", "LSTMCell", "MultiheadAttention"],
)
def test_other_numbers_are_left(
    make: Callable[[], nn.Module], name: str, dtype: torch.dtype
) -> None:
    layer = make()
    weight = torch.zeros(layer._parameters[name].shape).to(dtype)  # type: ignore[union-attr]
    model = nn.Sequential(with_weight(layer, name, weight), nn.Linear(64, 64), nn.Linear(64, 64))
    (site,) = (s for s in dr.survey(model) if s.module is layer and s.spec.name == name)
    short = str(dtype).removeprefix("torch.")
    assert (
        site.obstacle.startswith(f"its {name} is {short}, not one of float64") and not site.refused
    )
    dr.factorize(model, 2)
    assert site.path not in dr.current_plan(model) and layer._parameters[name].dtype == dtype  # type: ignore[union-attr]
    assert dr.current_plan(model)["1"] == dr.LowRank(2)
    with pytest.raises(ValueError, match=short):
        dr.factorize(model, 2, layers=site.path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_real_floating_point_is_taken(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    assert dr.factorize(model, 2, layers="*")[0].up.dtype == dtype


class Packed(Tensor):
    """As quantization libraries keep their weights."""


def test_a_sparse_weight_and_one_of_another_class_are_left() -> None:
    sparse = with_weight(nn.Linear(8, 8), "weight", torch.eye(8).to_sparse())
    packed = with_weight(nn.Linear(8, 8), "weight", torch.eye(8).as_subclass(Packed))
    reasons = [(s.obstacle, s.refused) for s in dr.survey(nn.Sequential(sparse, packed))]
    assert reasons == [
        ("its weight is sparse_coo, not dense", False),
        ("its weight is a Packed (quantized or the like)", False),
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")  # that torch.ao will be removed
def test_a_layer_quantized_by_torch_is_left() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    model[0] = torch.ao.nn.quantized.dynamic.Linear(64, 64)
    assert dr.survey(model)[0].obstacle == "its weight is quantized"
    assert dr.current_plan(dr.factorize(model, 2))["1"] == dr.LowRank(2)


def test_a_method_set_on_the_module_itself_is_refused_by_name() -> None:
    """As for seamless images: the padding of a convolution, changed on the module."""
    layer = nn.Conv2d(8, 8, 3)

    def padded(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = nn.functional.pad(x, (1, 1, 0, 0), mode="circular")
        return nn.functional.conv2d(x, weight, bias)

    layer._conv_forward = padded.__get__(layer)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="its _conv_forward is set on the module itself"):
        dr.factorize(nn.Sequential(layer), 2, layers="*")
    del layer._conv_forward
    layer.reset_parameters = lambda: None  # type: ignore[method-assign]
    dr.factorize(nn.Sequential(layer), 2, layers="*")


@pytest.mark.parametrize("name", ["form", "resolved", "execution", "_weights", "plain"])
def test_an_attribute_with_a_name_of_ranked_layers_is_refused_by_name(name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    setattr(model[0], name, "mine")
    with pytest.raises(ValueError, match=f"attribute {name} has a name .* rename it"):
        dr.factorize(model, 2, layers="*")
    assert type(model[0]) is nn.Linear and getattr(model[0], name) == "mine"
