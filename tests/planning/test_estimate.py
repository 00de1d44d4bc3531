"""What an estimate tells is what a run has: parameters, FLOPs and memory in each phase."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BY_NAME, Architecture
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs

import dynarank as dr
from dynarank.cost.dry_run import dry_run
from dynarank.cost.flops import count_flops
from dynarank.planning.estimate_result import Estimate
from dynarank.schedules import decay, dynamic_rank

STEPS = 310
SCHEDULE = dynamic_rank(4, inflate=0.4, deflate=0.8)
TOLERANCE = 0.02  # of the memory of a step, where it is counted without computing


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 64))


def state(model: nn.Module, optimizer: Optimizer) -> str:
    """All that an estimate may not change."""
    values = [(n, id(p), id(p.grad), p.tolist()) for n, p in model.named_parameters()]
    buffers = [(n, id(b), b.tolist()) for n, b in model.named_buffers()]
    modes = [(type(m), m.training, len(vars(m)["_forward_hooks"])) for m in model.modules()]
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    drawn = torch.get_rng_state().sum().item(), random.getstate()
    return repr((values, buffers, modes, groups, str(optimizer.state), drawn))


@pytest.mark.parametrize("one", ARCHITECTURES, ids=str)
def test_it_is_exact_in_each_phase_of_each_architecture(one: Architecture) -> None:
    model, batch = one.build(), one.batch()
    optimizer = torch.optim.AdamW(model.parameters())
    found = dr.estimate(model, batch, schedule=SCHEDULE, total_steps=STEPS, optimizer=optimizer)
    assert [phase.start for phase in found.phases] == [0, 124, 248]
    measured = dry_run(model, [optimizer], [p.cost.plan for p in found.phases], batch, rounds=0)
    for phase, ran in zip(found.phases, measured, strict=True):
        twin = copy.deepcopy(model)
        dr.apply_plan(twin, phase.cost.plan)
        parameters = list(twin.parameters())
        assert phase.cost.total_parameters == sum(p.numel() for p in parameters)
        trained = [p for p in parameters if p.requires_grad]
        assert phase.cost.trainable_parameters == sum(p.numel() for p in trained)
        assert phase.memory.parameters == sum(p.nbytes for p in parameters)
        assert phase.memory.gradients == sum(p.nbytes for p in trained)
        assert phase.flops == count_flops(twin, batch)
        assert phase.memory.total == pytest.approx(ran.peak_bytes, rel=TOLERANCE)


def test_it_tells_what_processes_all_reduce() -> None:
    model = net()
    options = {"schedule": SCHEDULE, "total_steps": STEPS}
    found = dr.estimate(model, torch.ones(8, 64), **options, processes=4)
    for phase, data in zip(found.phases, found.to_dict()["phases"], strict=True):
        trained = 4 * phase.cost.trainable_parameters
        assert data["all_reduced_bytes_per_step"] == trained
        assert data["all_reduced_bytes"] == phase.all_reduced_bytes
        assert phase.all_reduced_bytes == trained * (phase.stop - phase.start)
    text, whole = str(found), sum(phase.all_reduced_bytes for phase in found.phases)
    assert max(map(len, text.splitlines())) <= 100
    for phase in found.phases:
        size = 4 * phase.cost.trainable_parameters / 1024
        assert f", all-reduced {size:.3g}K a step" in text
    assert f"each sends {whole * 1.5 / 2**20:.3g}M in the run" in text

    quiet = dr.estimate(model, torch.ones(8, 64), **options)
    assert "educed" not in str(quiet) and quiet.to_dict()["processes"] is None
    assert quiet.to_dict()["phases"] == found.to_dict()["phases"]
    now = dr.estimate(model, torch.ones(8, 64), processes=1)
    assert "each sends 0B a step" in str(now)
    with pytest.raises(ValueError, match="processes"):
        dr.estimate(model, torch.ones(8, 64), processes=0)


@pytest.mark.parametrize("one", ARCHITECTURES, ids=str)
def test_it_prints_in_a_hundred_columns_and_is_json(one: Architecture) -> None:
    model = one.build().to("meta")
    now = dr.estimate(model, one.batch())
    planned = dr.estimate(model, one.batch(), schedule=SCHEDULE, total_steps=STEPS)
    for found in (now, planned):
        assert max(map(len, str(found).splitlines())) <= 100
        assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
        assert str(found) == repr(found)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_that_of_the_real_optimizer(name: str, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    found = dr.estimate(
        model, torch.ones(8, 64, dtype=dtype), schedule=SCHEDULE, total_steps=STEPS,
        optimizer=optimizer,
    )  # fmt: skip
    for phase in found.phases:
        twin, own = copy.deepcopy((model, optimizer))
        dr.apply_plan(twin, phase.cost.plan, optimizer=own, moments="reset")
        twin(torch.ones(8, 64, dtype=dtype)).sum().backward()
        own.step()
        kept = [v for one in own.state.values() for v in one.values() if torch.is_tensor(v)]
        assert phase.memory.optimizer == sum(v.nbytes for v in kept)


def test_an_optimizer_that_cannot_step_alone_is_said() -> None:
    model = net()
    found = dr.estimate(model, torch.ones(8, 64), optimizer=torch.optim.LBFGS(model.parameters()))
    assert found.phases[0].memory.optimizer is None
    assert "its state is not in the total" in str(found)


def test_without_an_optimizer_it_says_which_is_assumed() -> None:
    assert "AdamW, assumed" in str(dr.estimate(net(), torch.ones(8, 64)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("measure", [True, False])
def test_nothing_of_the_users_changes(measure: bool, training: bool) -> None:
    model = net().train(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = lrs.CosineAnnealingLR(optimizer, STEPS)
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    before, rates = state(model, optimizer), repr(scheduler.state_dict())
    found = dr.estimate(
        model, torch.randn(8, 64, generator=torch.Generator().manual_seed(0)),
        schedule=dynamic_rank(4), total_steps=STEPS, lr_scheduler=scheduler, optimizer=optimizer,
        measure=measure,
    )  # fmt: skip
    assert (state(model, optimizer), repr(scheduler.state_dict())) == (before, rates)
    assert (found.seconds is not None) == measure
    assert ("s/step" in str(found)) == measure


BATCHES: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda words: words,
    "tuple": lambda words: (words,),
    "dict": lambda words: {"input_ids": words},
    "meta": lambda words: {"input_ids": words.to("meta")},
}


@pytest.mark.parametrize("kind", BATCHES)
def test_any_batch(kind: str) -> None:
    one = BY_NAME["bert"]
    first = dr.estimate(one.build(), one.batch())
    with torch.device("meta" if kind == "meta" else "cpu"):
        model = one.build()
    found = dr.estimate(model, BATCHES[kind](one.batch()))
    assert found.cost == first.cost


def test_a_batch_encoding() -> None:
    from transformers import BatchEncoding

    one = BY_NAME["bert"]
    found = dr.estimate(one.build(), BatchEncoding({"input_ids": one.batch()}))
    assert found.cost == dr.estimate(one.build(), one.batch()).cost


def test_what_the_model_reads_itself_is_counted_and_said() -> None:
    """A vision transformer looks at a weight's dtype, and the weight is computed for that."""
    one = BY_NAME["vit"]
    found = dr.estimate(one.build(), one.batch(), schedule=SCHEDULE, total_steps=STEPS, layers="*")
    assert found.phases[0].extra_flops > 0
    assert "The model reads weights of layers itself" in str(found)


@pytest.mark.parametrize("early", [False, True])
def test_it_tells_what_passes_through_the_network_before_cuts(early: bool) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))), torch.randn(8, 64)
    schedule, steps = decay(total=0.8, cuts=[3 if early else 10, 20]), 50
    found = dr.estimate(model, batch, schedule=schedule, total_steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ranks = dr.RankScheduler(model, optimizer, schedule, steps)
    passes: list[bool] = []
    model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    for _ in range(steps):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.step()
    told, kept = found.calibration, 3 if early else 8  # of the first cut
    assert told["cuts"] == 2 and told["batches"] == kept + 8 == passes.count(False)
    first, second = found.cost.full_rank.forward, found.phases[1].flops.forward
    whole = found.cost.full_rank.training * steps
    assert told["relative_flops"] == pytest.approx((kept * first + 8 * second) / whole)
    assert f"Before the 2 cuts {kept + 8} batches pass through the network: " in str(found)
    assert found.to_dict()["calibration"] == told
    fixed = dr.estimate(model, batch, schedule=SCHEDULE, total_steps=steps)
    assert fixed.calibration["cuts"] == 0 and "pass through" not in str(fixed)


def test_without_a_schedule_each_layer_has_its_break_even_rank() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Conv1d(1, 1, 1))
    found = dr.estimate(nn.Sequential(model[0]), torch.ones(8, 64)).to_dict()
    (layer,) = found["layers"]
    rank = layer["break_even_rank"]
    use = dr.estimate(nn.Sequential(model[0]), torch.ones(8, 64)).use.layers["0"]
    for kind, cost in (("parameters", "params"), ("flops", "flops")):
        full = use.cost(cost, dr.FullRank())  # type: ignore[arg-type]
        assert use.cost(cost, dr.LowRank(rank[kind], execution="factored")) <= full  # type: ignore[arg-type]
        assert use.cost(cost, dr.LowRank(rank[kind] + 1, execution="factored")) > full  # type: ignore[arg-type]


def test_layers_that_train_in_part_are_counted_so() -> None:
    model = net()
    for p in model[0].parameters():
        p.requires_grad_(False)
    found = dr.estimate(model, torch.ones(8, 64), schedule=SCHEDULE, total_steps=STEPS)
    for phase in found.phases:
        twin = copy.deepcopy(model)
        dr.apply_plan(twin, phase.cost.plan)
        assert phase.memory.gradients == sum(p.nbytes for p in twin.parameters() if p.requires_grad)


def test_a_model_without_weights_costs_nothing() -> None:
    found = dr.estimate(nn.ReLU(), torch.ones(2, 3))
    assert (found.relative_flops, found.phases[0].memory.parameters) == (1.0, 0)


LATE: dict[str, Callable[[Optimizer, int], Any]] = {
    "multi-step": lambda o, n: lrs.MultiStepLR(o, [n // 2, 3 * n // 4], 0.1),
    "lambda": lambda o, n: lrs.LambdaLR(o, lambda step: max(0.0, 1 - step / n)),
}


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("every", [1, 31])
def test_phases_follow_what_is_said_of_the_lr_scheduler(name: str, every: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = LATE[name](optimizer, STEPS // every)
    how: dict[str, Any] = {
        "schedule": dynamic_rank(4),
        "total_steps": STEPS,
        "lr_scheduler": scheduler,
    }
    found = dr.estimate(model, torch.ones(8, 64), **how, lr_every=every, optimizer=optimizer)
    ranks = dr.RankScheduler(
        model, optimizer, dynamic_rank(4), STEPS, lr_scheduler=scheduler, lr_every=every
    )
    assert [one.start for one in found.phases] == [one.start for one in ranks.phases()]
    assert f"(lr_every={every})" in str(found)


def test_a_compiled_model_is_estimated_as_it_is() -> None:
    model, how = net(), {"schedule": SCHEDULE, "total_steps": STEPS}
    found = dr.estimate(torch.compile(model, backend="eager"), torch.ones(8, 64), **how)  # type: ignore[arg-type]
    assert found.cost == dr.estimate(model, torch.ones(8, 64), **how).cost  # type: ignore[arg-type]


def test_an_unknown_interval_is_said_in_a_warning_and_in_the_table() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lrs.MultiStepLR(optimizer, [10, 20])
    with pytest.warns(UserWarning, match="how often MultiStepLR is stepped") as caught:
        found = dr.estimate(
            model, torch.ones(8, 64), schedule=dynamic_rank(4), total_steps=STEPS,
            lr_scheduler=scheduler,
        )  # fmt: skip
    assert len(caught) == 1
    assert "how often MultiStepLR is stepped" in str(found)
    assert found.notes == tuple(found.to_dict()["notes"])


def refusals() -> dict[str, tuple[str, Callable[[], Estimate]]]:
    model, x = net(), torch.ones(8, 64)
    other = torch.optim.SGD(net().parameters(), lr=0.1)
    scheduler = lrs.CosineAnnealingLR(other, 10)
    how: dict[str, Any] = {"schedule": SCHEDULE, "total_steps": 10}
    return {
        "no steps": ("total_steps is not given", lambda: dr.estimate(model, x, schedule=SCHEDULE)),
        "no schedule": (
            "schedule is not given",
            lambda: dr.estimate(model, x, lr_scheduler=scheduler),
        ),
        "no values": (
            "on the meta device",
            lambda: dr.estimate(net().to("meta"), x, measure=True),
        ),
        "lazy": ("lazy parameters", lambda: dr.estimate(nn.LazyLinear(8), x)),
        "of another": (
            "trains in no optimizer|in no optimizer|another optimizer|no optimizer",
            lambda: dr.estimate(model, x, optimizer=other, **how),
        ),
        "rank": (
            "rank",
            lambda: dr.estimate(model, x, schedule=dynamic_rank(999), total_steps=10, layers="*"),
        ),
        "layers": (
            "nothing-like-it",
            lambda: dr.estimate(model, x, layers="nothing-like-it", **how),
        ),
        "steps": ("total_steps", lambda: dr.estimate(model, x, schedule=SCHEDULE, total_steps=0)),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_told_is_refused(name: str) -> None:
    message, call = refusals()[name]
    with pytest.raises(ValueError, match=message):
        call()
