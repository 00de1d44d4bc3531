"""The cost of a run, counted step by step, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynarank.cost.flops import trace
from dynarank.cost.schedule import cost_schedule
from dynarank.forms import FullRank, LowRank
from dynarank.schedules import dynamic_rank
from dynarank.train.ledger import Ledger


def test_it_adds_up_what_each_step_cost() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    use = trace(model, torch.ones(2, 64))
    ledger = Ledger(use, {"0": LowRank(16)})
    assert ledger.relative_flops == 0 and ledger.trainable_peak == 0
    for _ in range(3):
        ledger.step()
    ledger.turn({"0": FullRank()})
    assert ledger.last_trainable == 2048 and ledger.trainable == 4096
    ledger.step()
    full, low = use.flops({"0": FullRank()}).training, use.flops({"0": LowRank(16)}).training
    assert ledger.training_flops == 3 * low + full
    assert ledger.relative_flops == pytest.approx((3 * low + full) / (4 * full))
    assert (ledger.trainable_peak, ledger.trainable_mean) == (4096, (3 * 2048 + 4096) / 4)


def test_it_agrees_with_the_plan_of_a_schedule() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))
    use = trace(model, torch.ones(4, 64))
    cost = cost_schedule(use, dynamic_rank(4, inflate=3, deflate=8), ["0"], 10)
    ledger = Ledger(use, cost.phases[0].phase.plan)
    for phase in cost.phases:
        ledger.turn(phase.phase.plan)
        for _ in range(phase.phase.steps):
            ledger.step()
    assert ledger.training_flops == cost.training_flops
    assert ledger.relative_flops == pytest.approx(cost.relative_training)
    assert ledger.trainable_mean == pytest.approx(cost.mean_trainable)
    assert ledger.trainable_peak == cost.peak_trainable
