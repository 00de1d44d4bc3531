"""The rank of what training has added, whatever happened to the layer's form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, SpectralMonitor
from dynarank.forms import Form
from dynarank.monitors.singular_values import effective_rank


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 12, 3), nn.Flatten(), nn.Linear(12, 10)).to(dtype)


def disturb(model: nn.Module, size: float = 0.1) -> None:
    """What training does: every parameter that trains moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def weights(model: nn.Sequential) -> dict[str, Tensor]:
    return {path: model[int(path)].weight.detach().double().clone() for path in ("0", "2")}


def expected(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    return {
        path: effective_rank(torch.linalg.svdvals((after[path] - before[path]).flatten(1)))
        for path in before
    }


FORMS: list[Form] = [
    FullRank(),
    LowRank(3),
    Adapted(2),
    LowRank(3, "tucker"),
    LowRank(3, "cp"),
    Adapted(2, "separable", alpha=3.0),
]


@pytest.mark.parametrize("after", FORMS, ids=str)
@pytest.mark.parametrize("before", FORMS, ids=str)
def test_the_update_is_of_the_effective_weight_through_any_change_of_form(
    before: Form, after: Form
) -> None:
    model = net()
    dr.apply_plan(model, {"0": before, "2": before})
    disturb(model)
    start = weights(model)
    monitor = SpectralMonitor(model, layers=["0", "2"], updates=True)
    disturb(model)
    dr.apply_plan(model, {"0": after, "2": after})
    disturb(model)
    ranks = {path: reading.update_rank for path, reading in monitor.read().items()}
    assert ranks == pytest.approx(expected(start, weights(model)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["svd", "tucker", "separable"])
def test_a_lossless_change_of_form_is_no_update(name: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    low = LowRank(4, name)
    dr.apply_plan(model, {"0": low, "2": low})
    monitor = SpectralMonitor(model, updates=True)
    for form in (FullRank(), Adapted(2, name), FullRank(), low):
        dr.apply_plan(model, {"0": form, "2": form})
        if dtype != torch.bfloat16 or form != low:  # whose split is lossy in bf16
            assert [r.update_rank for r in monitor.read().values()] == [0.0, 0.0], form


def test_small_updates_in_half_precision_count() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).bfloat16()
    monitor = SpectralMonitor(model, updates=True)
    with torch.no_grad():
        model[0].weight[3] *= 1 + 2**-7  # one unit in the last place, of one row
    assert monitor.read()["0"].update_rank == pytest.approx(1.0, abs=1e-6)


def test_truncation_is_an_update() -> None:
    model = net()
    monitor = SpectralMonitor(model, layers="2", updates=True)
    start = weights(model)
    dr.apply_plan(model, {"2": LowRank(3)})
    rank = monitor.read()["2"].update_rank
    assert rank == pytest.approx(expected(start, weights(model))["2"], rel=1e-6)
    assert rank is not None and rank > 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_the_update_of_factors_needs_no_product(out: int, ins: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(ins, out, bias=False)).double()
    dr.apply_plan(model, {"0": LowRank(min(rank, out, ins))})
    before = model[0].weight.detach().clone()
    monitor = SpectralMonitor(model, updates=True)
    disturb(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynarank.layers.WeightSpec.effective", refuse)
        found = monitor.read()["0"].update_rank
    added = effective_rank(torch.linalg.svdvals(model[0].weight.detach() - before))
    assert found == pytest.approx(added, rel=1e-6)


def refuse(*_: object) -> Tensor:
    raise AssertionError("joined")


def test_the_start_is_kept_as_factors_where_it_is_low_rank() -> None:
    model = net(torch.float32)
    assert SpectralMonitor(model).nbytes == 0
    assert SpectralMonitor(model, layers="2", updates=True).nbytes == 4 * 10 * 12
    dr.apply_plan(model, {"2": LowRank(3)})
    assert SpectralMonitor(model, updates=True).nbytes == 4 * 3 * (10 + 12)
    dr.apply_plan(model, {"2": Adapted(2)})
    assert SpectralMonitor(model, updates=True).nbytes == 4 * (10 * 12 + 2 * (10 + 12))


def test_the_start_is_a_copy() -> None:
    model = net()
    monitor = SpectralMonitor(model, layers="2", updates=True)
    disturb(model)
    assert monitor.read()["2"].update_rank == pytest.approx(monitor.read()["2"].update_rank)
    assert monitor.read()["2"].update_rank != 0.0


def test_without_updates_or_without_a_sound_start_there_is_no_update_rank() -> None:
    model = net()
    assert SpectralMonitor(model, layers="2").read()["2"].update_rank is None
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    monitor = SpectralMonitor(model, layers="2", updates=True)
    with torch.no_grad():
        model[2].weight[0, 0] = 0.0
    assert monitor.read()["2"].update_rank is None
