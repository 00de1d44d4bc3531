from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from small_run import FULL, LAST, LOW, SCHEDULE, STEPS, forms, net, sgd, train_step, untouched
from stepping import one_step
from torch import nn
from torch.optim import Optimizer, lr_scheduler

import dynarank as dr
from dynarank import Adapted, LowRank, RankScheduler
from dynarank.forms import Change, Form, Plan
from dynarank.monitors.gradient_window import GradientWindow
from dynarank.schedules import (
    Clock,
    ClosedLoop,
    Phases,
    RankSchedule,
    Readings,
    as_schedule,
    full_rank,
    low_rank,
)

# The plan at each step.


def test_the_model_is_at_the_first_plan_at_construction() -> None:
    model = net()
    optimizer = sgd(model)
    seen: list[list[Change]] = []
    ranks = RankScheduler(model, optimizer, SCHEDULE, STEPS, callbacks=[seen.append])
    assert forms(model) == [LOW, LOW, FULL]
    assert [[change.path for change in changes] for changes in seen] == [["0", "2"]]
    assert (ranks.last_step, ranks.total_steps, ranks.layers) == (0, STEPS, ("0", "2"))
    assert [phase.start for phase in ranks.phases()] == [0, 4, 8]


def test_changes_happen_exactly_at_their_steps_and_are_told() -> None:
    model = net()
    optimizer = sgd(model)
    seen: list[list[Change]] = []
    ranks = RankScheduler(model, optimizer, SCHEDULE, STEPS, callbacks=[seen.append])
    seen.clear()  # of the first plan
    returned: dict[int, list[Change]] = {}
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, step)
        if changes := ranks.step():
            returned[step] = changes
        form = LOW if step < 4 else FULL if step < 8 else LAST
        assert forms(model) == [form, form, FULL]
        assert ranks.last_step == step
    told = {step: [(c.path, c.before, c.after) for c in made] for step, made in returned.items()}
    assert told == {
        4: [("0", LOW, FULL), ("2", LOW, FULL)],
        8: [("0", FULL, LAST), ("2", FULL, LAST)],
    }
    assert seen == list(returned.values())


def test_a_model_that_is_at_the_plan_already_does_not_change() -> None:
    model = dr.factorize(net(), 2)
    optimizer = sgd(model)
    seen: list[list[Change]] = []
    schedule = Phases([0, 2], [LOW, LowRank(0.6)])  # .6 of the cost of 8 x 8 is rank 2
    with untouched(model, optimizer):
        ranks = RankScheduler(model, optimizer, schedule, 9, layers="0", callbacks=[seen.append])
        assert [one_step(ranks) for _ in range(5)] == [[]] * 5
    assert seen == []


def test_stepping_beyond_the_run_keeps_the_last_plan() -> None:
    model = net()
    ranks = RankScheduler(model, sgd(model), Phases([0, 3, 7], [LOW, FULL, LAST]), 5)
    clocks: list[Clock] = []
    ranks.schedule = as_schedule(lambda clock, readings: clocks.append(clock) or {"0": FULL})
    changes = [one_step(ranks) for _ in range(9)]
    assert [bool(some) for some in changes] == [True] + [False] * 8
    assert [clock.step for clock in clocks] == [1, 2, 3, 4, 4, 4, 4, 4, 4]
    assert {clock.total_steps for clock in clocks} == {5}
    assert ranks.last_step == 9


def test_a_schedule_may_give_the_same_dict_again_and_again() -> None:
    plan: dict[str, Form] = {}

    def schedule(clock: Clock, readings: Readings) -> Plan:
        plan["0"] = LOW if clock.step < 4 else FULL
        return plan

    model = net()
    ranks = RankScheduler(model, sgd(model), schedule, STEPS, layers="0")
    assert [bool(one_step(ranks)) for _ in range(6)] == [False] * 3 + [True] + [False] * 2


def test_optimizer_groups_fit_through_a_whole_run() -> None:
    model = net()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    ranks = RankScheduler(model, optimizer, SCHEDULE, STEPS)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, step)
        ranks.step()
        trained = [p for p in model.parameters() if p.requires_grad]
        held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        assert held[0] == [id(p) for p in trained if p.ndim > 1]  # in the model's order
        assert held[1] == [id(p) for p in trained if p.ndim == 1]
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.01]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.01]
        new = {id(model[i].down) for i in (0, 2) if step == 8}  # of an adapter: starts as new
        assert {id(p) for p in optimizer.state} == {id(p) for p in trained} - new
        downs = [model[0].down, model[2].down] if step > 8 else []
        for p, state in optimizer.state.items():
            assert state["step"] == (step - 8 if any(p is down for down in downs) else step)
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert names == ["0.base", "2.base"]


def test_moments_are_projected_or_reset_as_asked() -> None:
    model = net()
    optimizer = sgd(model)
    ranks = RankScheduler(model, optimizer, SCHEDULE, STEPS, moments="reset")
    for step in range(1, 5):
        train_step(model, optimizer, step)
        ranks.step()
    kept = {name for name, p in model.named_parameters() if p in optimizer.state}
    assert kept == {"0.bias", "2.bias", "4.weight", "4.bias"}


def test_the_schedule_sees_shapes_and_learning_rate() -> None:
    seen: list[Readings] = []

    def schedule(clock: Clock, readings: Readings) -> Plan:
        seen.append(readings)
        return {}

    model = net()
    optimizer = sgd(model)
    ranks = RankScheduler(model, optimizer, schedule, STEPS, layers="*")
    optimizer.param_groups[0]["lr"] = 0.025
    one_step(ranks)
    shapes = {"0": (8, 6), "2": (6, 8), "4": (3, 6)}
    assert seen.pop() == Readings(shapes, 0.025)
    assert seen and all(readings == Readings(shapes, 0.1) for readings in seen)


def test_with_several_optimizers_there_is_no_one_learning_rate() -> None:
    seen: list[float | None] = []

    def schedule(clock: Clock, readings: Readings) -> Plan:
        seen.append(readings.learning_rate)
        return dict.fromkeys(readings.layers, LOW if clock.step < 1 else FULL)

    model = net()
    both = [
        torch.optim.SGD(model[:2].parameters(), lr=0.1),
        torch.optim.Adam(model[2:].parameters()),
    ]
    ranks = RankScheduler(model, both, schedule, STEPS, layers=["0", "2"])
    assert len(one_step(ranks)) == 2 and set(seen) == {None}
    held = [[id(p) for group in one.param_groups for p in group["params"]] for one in both]
    assert held == [[id(p) for p in part.parameters()] for part in (model[:2], model[2:])]


# Which layers.


def test_by_default_the_layers_cheaper_in_every_low_rank_phase() -> None:
    for first, last in [(1, 2), (2, 1)]:
        model = net()
        schedule = Phases([0, 4, 8], [LowRank(first), FULL, LowRank(last)])
        assert RankScheduler(model, sgd(model), schedule, STEPS).layers == ("0", "2")
    for then in (FULL, Adapted(3)):
        model = net()
        schedule = Phases([0, 4], [LowRank(1), then])
        assert RankScheduler(model, sgd(model), schedule, STEPS).layers == ("0", "2")


def test_by_default_all_but_the_output_layer_if_no_phase_is_low_rank() -> None:
    for schedule in (full_rank(), Phases([0], [LAST])):
        model = net()
        assert RankScheduler(model, sgd(model), schedule, STEPS).layers == ("0", "2")


def test_by_default_the_layers_that_are_ranked_already() -> None:
    for schedule, form in [(SCHEDULE, LOW), (Phases([0], [LAST]), LAST)]:
        model = dr.factorize(net(), 1, layers="4")
        assert RankScheduler(model, sgd(model), schedule, STEPS).layers == ("4",)
        assert forms(model) == [FULL, FULL, form]


def test_layers_are_those_asked_for() -> None:
    model = net()
    assert RankScheduler(model, sgd(model), SCHEDULE, STEPS, layers=["4", "0"]).layers == ("0", "4")
    assert forms(model) == [LOW, FULL, LOW]


# What cannot be is refused before anything changes.


def late(form: Form, path: str = "0") -> Callable[[Clock, Readings], Plan]:
    """From step 9 on an impossible form."""

    def schedule(clock: Clock, readings: Readings) -> Plan:
        return {"0": LOW, "2": LOW} if clock.step < 9 else {"2": FULL, path: form}

    return schedule


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (late(LowRank(7)), r"from step 9, layer '0': rank 7 is above the limit 6"),
        (late(Adapted(9)), r"from step 9, layer '0': rank 9 is above the limit 6"),
        (low_rank(9), r"rank 9 makes no layer of the model cheaper"),
        (lambda clock, readings: {"3.nope": LOW}, r"no layer '3.nope'"),
        (lambda clock, readings: {"1": LOW}, r"no layer|cannot change form"),
        (low_rank(2, decomposition="nope"), r"unknown decomposition 'nope'; known: svd"),
        (late(FULL, "nope"), r"no layer 'nope'"),
        (late(LOW, "1"), r"'1' cannot change form"),
        (late(LowRank(2, "nope")), r"unknown decomposition"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_at_construction(
    schedule: Callable[[Clock, Readings], Plan], message: str
) -> None:
    model = net()
    optimizer = sgd(model)
    train_step(model, optimizer, 0)
    layers = None if schedule == low_rank(9) else ["0", "2"]
    with untouched(model, optimizer), pytest.raises(ValueError, match=message):
        RankScheduler(model, optimizer, schedule, STEPS, layers=layers)


def test_an_optimizer_of_another_model_is_refused_at_construction() -> None:
    model, other = net(), sgd(net())
    with untouched(model, other), pytest.raises(ValueError, match="no optimizer given holds"):
        RankScheduler(model, other, SCHEDULE, STEPS)


def test_a_run_has_at_least_one_step() -> None:
    model = net()
    with pytest.raises(ValueError, match="whole number of at least 1"):
        RankScheduler(model, sgd(model), SCHEDULE, 0)


# Learning-rate schedulers do not notice.


def sequential(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(
        optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 9)], [3]
    )


LR_SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 8, 9]),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.3, 0.2], total_steps=STEPS + 1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1 / (1 + n)]),
    "sequential": sequential,
}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_learning_rates_are_the_same_with_and_without_changes(name: str) -> None:
    traces: list[list[list[tuple[float, float]]]] = []
    for schedule in (SCHEDULE, full_rank()):
        model = net()
        split = [p for p in model.parameters() if p.ndim > 1], [*model.parameters()][1::2]
        groups = [{"params": some, "lr": lr} for some, lr in zip(split, (0.1, 0.02), strict=True)]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        del split, groups  # a change would replace what these lists hold
        ranks = RankScheduler(model, optimizer, schedule, STEPS)
        rates = LR_SCHEDULERS[name](optimizer)
        traces.append([])
        for step in range(STEPS):
            traces[-1].append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
            train_step(model, optimizer, step)
            ranks.step()
            rates.step()
    assert traces[0] == traces[1]
    assert len({str(rates) for rates in traces[0]}) >= 5


@pytest.mark.parametrize(
    "value", [lr_scheduler.CosineAnnealingLR, lr_scheduler.LRScheduler, "cosine"]
)
def test_an_lr_scheduler_is_an_object(value: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match="lr_scheduler is an LR scheduler, such as"):
        RankScheduler(model, sgd(model), SCHEDULE, STEPS, lr_scheduler=value)


def test_the_lr_scheduler_of_another_optimizer_is_refused() -> None:
    model = net()
    optimizer, other = sgd(model), sgd(model)
    kinds = [*LR_SCHEDULERS.values(), lr_scheduler.ReduceLROnPlateau]
    for kind in kinds[:1] + kinds[2:3] + kinds[4:]:
        with untouched(model, optimizer), pytest.raises(ValueError, match="of another optimizer"):
            RankScheduler(model, optimizer, SCHEDULE, STEPS, lr_scheduler=kind(other))
    both = [optimizer, torch.optim.Adam(net().parameters())]
    for own in (lr_scheduler.ReduceLROnPlateau(optimizer), sequential(optimizer)):
        RankScheduler(model, both, SCHEDULE, STEPS, lr_scheduler=own).close()


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.LBFGS])
def test_an_optimizer_whose_state_cannot_move_is_refused_at_once(kind: type) -> None:
    model = net()
    with pytest.raises(ValueError, match=f"state of {kind.__name__} .* moments='reset'"):
        RankScheduler(model, kind(model.parameters()), SCHEDULE, STEPS)
    RankScheduler(model, kind(model.parameters()), SCHEDULE, STEPS, moments="reset")


@contextmanager
def surveys() -> Iterator[Counter[str]]:
    """Counts the traversals of a model while it is open."""
    counts = Counter[str]()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is dr.survey.__code__:
            counts["survey"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield counts
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize(
    ("schedule", "moments", "expected"),
    [
        (SCHEDULE, "project", [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]),
        # Spectra are read at every second step, and the layers change by what is read.
        (ClosedLoop(2, spectra_every=2), "project", [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]),
        # Gradients are kept for two steps before a change: one more survey finds their parameters.
        (SCHEDULE, "calibrated", [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]),
    ],
    ids=["plain", "spectra", "gradients"],
)
def test_the_model_is_surveyed_once_a_change(
    schedule: RankSchedule, moments: str, expected: list[int]
) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    window = GradientWindow(model, optimizer, length=2)
    policy: Any = window if moments == "calibrated" else moments
    counted: list[int] = []
    with surveys() as counts:
        ranks = RankScheduler(model, optimizer, schedule, STEPS, moments=policy)
        counted.append(counts["survey"])
        for step in range(len(expected) - 1):
            counts.clear()
            train_step(model, optimizer, step)
            ranks.step()
            counted.append(counts["survey"])
    assert counted == expected


def test_a_plan_for_an_unknown_layer_is_refused_by_name() -> None:
    model = net()
    with pytest.raises(ValueError, match="the model has no layer 'head'"):
        RankScheduler(model, sgd(model), lambda clock, readings: {"head": LowRank(2)}, STEPS)


def toggled_run(toggle: bool) -> list[float]:
    """The losses of a run that clips all gradients; those that no optimizer clears add up."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)), torch.randn(16, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = dr.schedules.dynamic_rank(rank=8, inflate=2, deflate=4)
    ranks = RankScheduler(model, optimizer, schedule, total_steps=10, layers="*")
    losses: list[float] = []
    for _ in range(10):
        if toggle:
            model.requires_grad_(False).requires_grad_(True)
        loss = (model(x) - x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_model_frozen_and_unfrozen_in_each_step_trains_as_without() -> None:
    assert toggled_run(True) == toggled_run(False)
