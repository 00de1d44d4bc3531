"""Factors of a fresh model: the model's own draw, with its norm, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from laws import assert_close
from torch import nn

import dynarank as dr
from dynarank.factors.initialization import initialize_factors
from dynarank.surgery.sites import survey


def hf_conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(40, 24)


LAYERS = {
    "linear": lambda: nn.Linear(48, 40),
    "conv1d": lambda: nn.Conv1d(16, 24, 3),
    "conv2d": lambda: nn.Conv2d(16, 24, 3),
    "conv3d": lambda: nn.Conv3d(16, 24, 2),
    "grouped": lambda: nn.Conv2d(32, 32, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(16, 24, 3, groups=2),
    "embedding": lambda: nn.Embedding(50, 30),
    "lstm": lambda: nn.LSTM(24, 24),
    "gru-cell": lambda: nn.GRUCell(24, 24),
    "attention": lambda: nn.MultiheadAttention(24, 2),
    "hf-conv1d": hf_conv1d,
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def fresh(layer: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[layer]()).to(dtype)


def norms(model: nn.Module) -> dict[str, torch.Tensor]:
    return {s.path: s.effective().double().norm() for s in survey(model) if s.form is not None}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_weight_keeps_its_norm(layer: str, dtype: torch.dtype) -> None:
    model = fresh(layer, dtype)
    before = norms(model)
    assert initialize_factors(model, 4, layers="*") is model
    assert all(form == dr.LowRank(4) for form in dr.current_plan(model).values())
    for path, norm in norms(model).items():
        assert_close(norm, before[path], TOLERANCES[dtype])


@pytest.mark.parametrize("decomposition", ["svd", "tucker", "cp", "separable"])
def test_it_is_the_truncated_weight_times_a_number(decomposition: str) -> None:
    model, other = fresh("conv2d"), fresh("conv2d")
    with torch.no_grad():
        for m in (model, other):
            m[0].weight.mul_(0.02)  # a model's own initialization counts, not reset_parameters
    initialize_factors(model, 4, layers="*", decomposition=decomposition)
    dr.factorize(other, 4, layers="*", decomposition=decomposition)
    (site,), (plain,) = survey(model), survey(other)
    ratio = site.effective().norm() / plain.effective().norm()
    assert ratio > 1.2
    assert_close(site.effective(), plain.effective() * ratio, 1e-12)
    shares = [(f.norm() / g.norm()) for f, g in zip(site.factors(), plain.factors(), strict=True)]
    for share in shares[1:]:
        assert_close(share, shares[0], 1e-12)


def test_full_rank_is_the_same_weight() -> None:
    model = fresh("linear")
    weight = model[0].weight.detach().clone()
    initialize_factors(model, 40, layers="*")
    assert_close(model[0].weight.detach(), weight, 1e-12)


def test_it_touches_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    initialize_factors(model, {"0": 4}, optimizer=optimizer)
    assert torch.equal(state, torch.get_rng_state())
    assert dr.current_plan(model)["1"] == dr.FullRank()
    for name, p in model.named_parameters():
        assert name not in before or torch.equal(p, before[name])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_schedule_goes_on_from_there() -> None:
    model = initialize_factors(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)), 4, layers="0")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dr.RankScheduler(model, optimizer, dr.schedules.low_rank(4), 8)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_tied_weights_are_scaled_once() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    model[1].weight = model[0].weight
    norm = model[0].weight.detach().norm()
    initialize_factors(model, 4, layers="*")
    assert_close(model[0].weight.detach().norm(), norm, 1e-6)
    assert model[0].up is model[1].up


def test_a_weight_of_zeros_stays_zero_and_can_learn() -> None:
    model = fresh("linear")
    nn.init.zeros_(model[0].weight)
    initialize_factors(model, 4, layers="*")
    assert not model[0].weight.any() and model[0].up.isfinite().all()
    assert model[0].up.any() or model[0].down.any()


def test_a_weight_with_factors_is_refused_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    dr.factorize(model, {"0": 4})
    plan = dr.current_plan(model)
    with pytest.raises(
        ValueError, match=r"layers with factors already: 0; .* instead of factorize"
    ):
        initialize_factors(model, 4, layers="*")
    assert dr.current_plan(model) == plan
