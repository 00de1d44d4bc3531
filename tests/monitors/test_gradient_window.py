"""Gradients kept before a change: the last ones, read only, for the layers that will change."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_run import LAST, LOW, STEPS, assert_same_bits, net, train_step
from torch import nn
from torch.optim import AdamW

import dynarank as dr
from dynarank import FullRank
from dynarank.monitors.gradient_window import WINDOW, GradientWindow
from dynarank.schedules import Phases

PHASES = Phases((0.0, 5 / 12, 10 / 12), (LOW, FullRank(), LAST))


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), 0.01)


def test_the_last_gradients_are_kept_as_the_optimizer_uses_them() -> None:
    model = net()
    optimizer = adamw(model)
    gradients = GradientWindow(model, optimizer, ["0"], length=3)
    seen = []
    for step in range(5):
        train_step(model, optimizer, step)
        seen.append(model[0].weight.grad.bfloat16())
    kept = gradients.of([model[0].weight])
    assert [len(sample) for sample in kept] == [1, 1, 1]
    assert all(torch.equal(a[0], b) for a, b in zip(kept, seen[-3:], strict=True))
    assert gradients.nbytes == 3 * 2 * 48
    assert gradients.of([model[2].weight]) == []
    gradients.watch([])
    train_step(model, optimizer, 9)
    assert gradients.nbytes == 0 and not optimizer._optimizer_step_pre_hooks


def test_the_gradients_that_a_closure_computes_are_kept() -> None:
    """It runs within the step, as in Lightning's trainer: before the step they are older ones."""
    model = net()
    optimizer = adamw(model)
    gradients, seen = GradientWindow(model, optimizer, ["0"]), list[torch.Tensor]()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(4, 6, dtype=torch.float64)).square().mean()
        loss.backward()
        seen.append(model[0].weight.grad.bfloat16())
        return loss

    optimizer.step(closure)
    optimizer.step(closure=closure)
    kept = gradients.of([model[0].weight])
    assert len(kept) == 2
    assert all(torch.equal(a[0], b) for a, b in zip(kept, seen, strict=True))


def test_what_says_nothing_is_left_out() -> None:
    """No gradient, one not finite, a step that is to be skipped; a scaled one is unscaled."""
    model = net()
    optimizer = adamw(model)
    gradients = GradientWindow(model, optimizer, ["0"])
    weight = model[0].weight
    optimizer.step()
    for value in (1.0, float("nan"), 3.0):
        weight.grad = torch.full_like(weight, value)
        gradients._read(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    gradients._read(optimizer)
    optimizer.found_inf = torch.tensor(0.0)
    gradients._read(optimizer)
    assert [sample[0][0, 0].item() for sample in gradients.of([weight])] == [1.0, 3.0, 0.75]
    with pytest.raises(ValueError, match="must be at least 1, got length=0"):
        GradientWindow(model, optimizer, length=0)


def run(length: int | None) -> tuple[list[torch.Tensor], list[set[str]]]:
    """Projected, or calibrated by the last gradients."""
    model = net()
    optimizer = adamw(model)
    moments = GradientWindow(model, optimizer, length=length) if length else "project"
    ranks = dr.RankScheduler(model, optimizer, PHASES, STEPS, moments=moments)
    watched, values = [], []
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, step)
        values.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        ranks.step()
        watched.append(set(ranks.gradients._rings) if ranks.gradients else set())
    return values, watched


def test_the_scheduler_looks_ahead_and_the_run_is_the_same_until_the_change() -> None:
    """Bitwise up to the first change; afterwards it differs, so the gradients were used."""
    plain, _ = run(None)
    kept, watched = run(3)
    assert all(torch.equal(a, b) for a, b in zip(plain[:5], kept[:5], strict=True))
    assert not torch.equal(plain[5], kept[5])
    both = {"0", "2"}
    assert watched == [set(), both, both, both, set(), set(), both, both, both, set(), set(), set()]


def test_calibrated_is_a_window_of_the_default_length_that_the_scheduler_steers() -> None:
    model = net()
    optimizer = adamw(model)
    ranks = dr.RankScheduler(model, optimizer, PHASES, STEPS, moments="calibrated")
    assert isinstance(ranks.gradients, GradientWindow) and ranks.gradients.length == WINDOW
    assert set(ranks.gradients._rings) == {"0", "2"} and optimizer._optimizer_step_pre_hooks
    ranks.close()
    assert not ranks.gradients._rings and not optimizer._optimizer_step_pre_hooks


def test_gathering_does_not_change_a_run() -> None:
    values = []
    for gather in (True, False):
        model = net()
        optimizer = adamw(model)
        gradients = GradientWindow(model, optimizer, ["0", "2", "4"]) if gather else None
        for step in range(6):
            train_step(model, optimizer, step)
        values.append([p.detach().clone() for p in model.parameters()])
        values[-1] += [v for state in optimizer.state.values() for v in state.values()]
        assert gradients is None or gradients.nbytes > 0
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_gradients_keep_no_parameter_alive_and_are_in_no_state() -> None:
    model = net()
    optimizer = adamw(model)
    gradients = GradientWindow(model, optimizer, ["0"])
    train_step(model, optimizer, 0)
    old = weakref.ref(model[0].weight)
    dr.deflate(model, 2, layers="0", optimizer=optimizer, moments=gradients)
    gc.collect()
    assert old() is None
    train_step(model, optimizer, 1)
    gradients.watch(["0"])  # the factors now
    train_step(model, optimizer, 2)
    assert [len(s) for s in gradients.of([model[0].down, model[0].up])] == [2]
    assert set(optimizer.state_dict()) == {"state", "param_groups", "dynarank"}
    copied = copy.deepcopy(optimizer)
    assert not copied._optimizer_step_pre_hooks


@pytest.mark.parametrize("saved_at", range(7))
def test_a_run_resumed_within_the_window_calibrates_with_the_same_gradients(saved_at: int) -> None:
    runs: list[Any] = []
    for _ in range(2):
        model = net()
        optimizer = adamw(model)
        window = GradientWindow(model, optimizer, length=3)
        ranks = dr.RankScheduler(model, optimizer, PHASES, STEPS, moments=window)
        runs.append((model, optimizer, ranks))
    for step in range(saved_at):
        train_step(*runs[0][:2], step)
        runs[0][2].step()
    for one, other in zip(runs[1][::-1], runs[0][::-1], strict=True):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    for model, optimizer, ranks in runs:
        for step in range(saved_at, STEPS):
            train_step(model, optimizer, step)
            ranks.step()
    for one, other in zip(*runs, strict=True):
        assert_same_bits(one.state_dict(), other.state_dict())


def test_gradients_of_other_parameters_are_refused() -> None:
    model = net()
    optimizer = adamw(model)
    gradients = GradientWindow(model, optimizer, ["0"])
    train_step(model, optimizer, 0)
    state = gradients.state_dict()
    dr.deflate(model, 2, layers="0", optimizer=optimizer)
    other = GradientWindow(model, optimizer, ["2"])
    with pytest.raises(ValueError, match="layer '0' trains parameters of the shapes"):
        other.load_state_dict(state)
    assert list(other.state_dict()) == ["2"]


def test_an_optimizer_without_second_moments_is_not_read() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    gradients = GradientWindow(model, optimizer, ["0"])
    train_step(model, optimizer, 0)
    assert gradients.nbytes == 0 and not optimizer._optimizer_step_pre_hooks


class Wrapper:
    """A wrapper that is no optimizer of torch, as Lookahead often is."""

    def __init__(self, optimizer: AdamW) -> None:
        self.optimizer, self.state = optimizer, optimizer.state
        self.param_groups = optimizer.param_groups
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step


def by_accelerate(optimizer: AdamW) -> Any:
    return Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("wrap", [by_accelerate, Wrapper])
def test_the_steps_of_a_wrapped_optimizer_are_read(wrap: Callable[[AdamW], Any]) -> None:
    model = net()
    optimizer = wrap(adamw(model))
    gradients = GradientWindow(model, optimizer, ["0"])
    for step in range(2):
        train_step(model, optimizer, step)
    assert len(gradients.of([model[0].weight])) == 2
    gradients.watch([])
