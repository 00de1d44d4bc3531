"""Running statistics are recalibrated after a truncation, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_run import poison
from stepping import one_step
from torch import nn

from dynarank import ActivationAwareTruncation, RankScheduler, UnfitWeightError
from dynarank.scheduler.batch_norm import BatchNormRecalibration, recalibrate_batch_norms
from dynarank.schedules import Phases, dynamic_rank


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


def normed() -> nn.Sequential:
    """Its norms are "1" and "3"."""
    torch.manual_seed(0)
    parts = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)]
    return nn.Sequential(*parts)


def buffers(model: nn.Module) -> dict[str, list[float]]:
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


def one_batch_then(error: BaseException) -> Iterator[torch.Tensor]:
    yield torch.randn(8, 4)
    raise error


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
def test_recalibration_that_is_interrupted_changes_nothing(error: BaseException) -> None:
    model = normed()
    before = buffers(model)
    with pytest.raises(type(error)):
        recalibrate_batch_norms(model, one_batch_then(error))
    assert buffers(model) == before
    assert [model[1].momentum, model[3].momentum] == [0.1, 0.1]
    assert all(module.training for module in model.modules())


def in_evaluation_mode(norm: nn.BatchNorm1d) -> None:
    norm.eval()


def with_a_frozen_weight_and_the_model_in_evaluation_mode(norm: nn.BatchNorm1d) -> None:
    norm.requires_grad_(False)


@pytest.mark.parametrize(
    "freeze", [in_evaluation_mode, with_a_frozen_weight_and_the_model_in_evaluation_mode]
)
def test_a_frozen_norm_keeps_its_statistics_and_is_run_by_them(freeze: Any) -> None:
    model, x = normed(), torch.randn(64, 4)
    freeze(model[1])
    if freeze is not in_evaluation_mode:
        model.eval()
    modes, before = [m.training for m in model.modules()], buffers(model)
    recalibrate_batch_norms(model, [x])
    after = buffers(model)
    assert {n for n in after if after[n] != before[n]} == {
        "3.running_mean", "3.running_var", "3.num_batches_tracked",
    }  # fmt: skip
    assert [m.training for m in model.modules()] == modes
    inputs = model[2](model[1].eval()(model[0](x)))
    assert torch.allclose(model[3].running_mean, inputs.mean(0), atol=1e-6)


def test_a_model_in_evaluation_mode_is_recalibrated_even_if_all_of_it_is_frozen() -> None:
    for model in (normed().eval(), normed().eval().requires_grad_(False)):
        before = buffers(model)
        recalibrate_batch_norms(model, [torch.randn(8, 4)])
        assert all(value != before[name] for name, value in buffers(model).items())


def test_a_norm_without_statistics_or_that_no_batch_reaches_is_left() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.plain = nn.BatchNorm1d(4, track_running_stats=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plain(self.used(x))

    model = Branches()
    model.unused.running_mean.fill_(3.0)
    recalibrate_batch_norms(model, [torch.randn(8, 4)])
    assert model.unused.running_mean.tolist() == [3.0] * 4
    assert model.plain.running_mean is None and model.plain.momentum == 0.1


def test_statistics_that_are_not_finite_are_refused_and_end_no_run() -> None:
    model = normed()
    before = buffers(model)
    poison(model, math.nan, "0")
    with pytest.raises(UnfitWeightError, match="BatchNorm '1' are not finite"):
        recalibrate_batch_norms(model, [torch.randn(8, 4)])
    assert buffers(model) == before
    model = normed()
    schedule = Phases([0, 1], [dynamic_rank(1).last, dynamic_rank(1).low])
    ranks = RankScheduler(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        schedule,
        9,
        layers="2",
        callbacks=[BatchNormRecalibration(lambda: [torch.randn(8, 4)])],
    )
    before = buffers(model)
    poison(model, math.nan, "0")
    with pytest.warns(RuntimeWarning, match="step 1: the inputs of BatchNorm '1'"):
        assert one_step(ranks)
    assert buffers(model) == before


def test_an_iterator_that_ends_with_the_first_change_is_refused_at_the_second() -> None:
    model = normed()
    one = iter([torch.randn(8, 4)])
    schedule = Phases([0, 1, 2, 3], [dynamic_rank(1).low, dynamic_rank(3).low] * 2)
    ranks = RankScheduler(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        schedule,
        9,
        layers="2",
        callbacks=[BatchNormRecalibration(lambda: one)],
    )
    one_step(ranks)
    before = buffers(model)
    with pytest.raises(ValueError, match="there is no batch to recalibrate BatchNorm on"):
        one_step(ranks)
    assert buffers(model) == before and model[1].momentum == 0.1


@pytest.mark.parametrize("kind", [BatchNormRecalibration, ActivationAwareTruncation])
def test_batches_are_a_function(kind: Any) -> None:
    with pytest.raises(ValueError, match="batches is a function that returns batches"):
        kind(iter([torch.randn(8, 4)]))
