"""What each way of computing keeps for the backward pass, and which way is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from covering import over
from every_layer import KINDS, Kind
from torch import nn

import dynarank as dr
from dynarank import Adapted, LowRank
from dynarank.decompositions import Geometry
from dynarank.forms import Form
from dynarank.layers import Call, WeightSpec, choose_execution, executions
from dynarank.surgery.sites import survey

ROWS, WIDTH, RANK = 2048, 64, 8


def saved(layer: nn.Module, x: torch.Tensor) -> int:
    """Entries kept for the backward pass beside the parameters, each memory once."""
    own = {p.data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize(
    ("form", "beside"),
    [
        (LowRank(RANK, execution="factored"), ROWS * RANK),
        (LowRank(RANK, execution="factored", recompute=True), 0),
        (LowRank(RANK, execution="joined"), WIDTH * WIDTH),
        (Adapted(RANK, execution="merged"), 0),
        (Adapted(RANK, execution="merged", recompute=True), 0),
        (Adapted(RANK, execution="two-branch", recompute=True), 0),
    ],
    ids=str,
)
def test_what_is_saved_beside_the_input(form: Form, beside: int) -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    dr.apply_plan(layer, {"": form})
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    assert saved(layer, x) == x.numel() + beside


def test_a_merged_convolution_saves_its_input_alone() -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1)
    dr.apply_plan(layer, {"": Adapted(8, execution="merged")})
    x = torch.randn(8, 16, 16, 16, requires_grad=True)
    assert saved(layer, x) == x.numel()


def test_the_merged_weight_is_kept_only_where_joining_is_dear() -> None:
    """With few rows joining it again would cost more than 2% of the layer."""
    layer = nn.Linear(WIDTH, WIDTH)
    dr.apply_plan(layer, {"": Adapted(RANK, execution="merged")})
    few = torch.randn(64, WIDTH, requires_grad=True)
    assert saved(layer, few) == few.numel() + WIDTH * WIDTH
    dr.apply_plan(layer, {"": Adapted(RANK, execution="merged", recompute=True)})
    assert saved(layer, few) == few.numel()


@pytest.mark.parametrize("rows", [8, 64, 512, 4096])
@pytest.mark.parametrize("rank", [4, 16, 32, 64])
@pytest.mark.parametrize("form", [LowRank, Adapted])
def test_auto_never_costs_more_than_another_execution(rows: int, rank: int, form: type) -> None:
    spec, call = WeightSpec("weight", (64, 96)), Call((rows, 96), Geometry(), True, True)
    chosen = choose_execution(spec, form(rank), call)
    every = executions(spec, form(rank), call)
    assert len(every) > 1
    assert chosen.flops.training == min(one.flops.training for one in every)


def test_the_formulas_of_the_method_page() -> None:
    n, m, r, rows = 64, 96, 8, 4096
    spec, call = WeightSpec("weight", (n, m)), Call((rows, m), Geometry(), True, True)
    whole, k = 6 * rows * n * m, r * (m + n) / (m * n)
    found = {
        (way.name, way.thin): way.flops.training / whole
        for form in (LowRank(r), Adapted(r))
        for way in executions(spec, form, call)
    }
    joined_again = r / (3 * rows)  # the merged weight is not kept with so many rows
    assert found["factored", False] == pytest.approx(k)
    assert found["joined", False] == pytest.approx(1 + r / rows)
    assert found["two-branch", False] == pytest.approx(2 / 3 + k)
    assert found["merged", True] == pytest.approx(2 / 3 + 2 * k / 3 + r / (3 * rows) + joined_again)
    assert found["merged", False] == pytest.approx(1 + r / rows + joined_again)


@over({"kind": KINDS, "execution": ["auto", "merged", "two-branch"], "recompute": [True, False]})
def test_a_base_gets_no_gradient_whatever_its_flag_says(
    kind: Kind, execution: Any, recompute: bool
) -> None:
    """A toggle of the whole model, as of GANs, unfreezes the bases too."""
    model, form = kind.make(), Adapted(2, execution=execution, recompute=recompute)
    dr.apply_plan(model, {site.path: form for site in survey(model)})
    bases = [name for name, p in model.named_parameters() if not p.requires_grad]
    model.requires_grad_(False).requires_grad_(True)
    model(*kind.inputs()).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == bases != []
