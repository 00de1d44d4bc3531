"""Running statistics are recalibrated after a truncation, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynarank import RankScheduler
from dynarank.scheduler.batch_norm import BatchNormRecalibration, recalibrate_batch_norms
from dynarank.schedules import dynamic_rank


def test_batch_norms_are_recalibrated_after_a_truncation_only() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    asked: list[int] = []
    batch = torch.randn(64, 6)

    def batches() -> list[torch.Tensor]:
        asked.append(ranks.last_step)
        return [batch]

    schedule = dynamic_rank(2, inflate=2, deflate=4, to="low-rank")
    ranks = RankScheduler(
        model, optimizer, schedule, 6, callbacks=[BatchNormRecalibration(batches)]
    )
    for _ in range(6):
        model(batch).sum().backward()
        optimizer.step()
        ranks.step()
    assert asked == [4]
    norm = model[1]
    inputs = model[0](batch).detach()
    recalibrate_batch_norms(model, [batch])
    assert torch.allclose(norm.running_mean, inputs.mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, inputs.var(0), atol=1e-6)


def test_recalibration_leaves_weights_modes_and_randomness() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    model[1].train()
    random, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    recalibrate_batch_norms(model, [(torch.randn(8, 4, generator=torch.Generator()), 1)])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert [module.training for module in model.modules()] == modes


def test_recalibration_without_a_batch_is_refused_and_changes_nothing() -> None:
    norm = nn.BatchNorm1d(4)
    norm.running_mean.fill_(3.0)
    used = iter([torch.randn(8, 4)])
    next(used)
    with pytest.raises(ValueError, match="there is no batch to recalibrate BatchNorm on"):
        recalibrate_batch_norms(norm, used)
    assert norm.running_mean.tolist() == [3.0] * 4 and norm.momentum == 0.1
