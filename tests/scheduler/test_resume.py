from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from small_run import (
    FULL,
    LOW,
    SCHEDULE,
    STEPS,
    Running,
    assert_same_bits,
    forms,
    net,
    poison,
    sgd,
    snapshot,
)
from stepping import one_step
from torch import nn
from torch.optim import Optimizer

import dynarank as dr
from dynarank import Adapted, LowRank, RankScheduler, SpectralMonitor
from dynarank.form_data import form_from_data
from dynarank.forms import Plan
from dynarank.schedules import Clock, Phases, RankSchedule, Readings, dynamic_rank

# A run saved and resumed is the run uninterrupted.

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": sgd,
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
}
SCHEDULES: dict[str, RankSchedule] = {
    "adapted": SCHEDULE,
    "low-rank": dynamic_rank(2, inflate=4, deflate=8, to="low-rank"),
    "two-branch": dynamic_rank(0.3, inflate=0.3, deflate=0.5, execution="two-branch"),
    "many": Phases([0, 2, 4, 6, 9], [FULL, LowRank(3), Adapted(1), LowRank(1), Adapted(2)]),
}


def running(schedule: RankSchedule, optimizer: str = "sgd", layers: object = None) -> Running:
    model = net()
    made = OPTIMIZERS[optimizer](model)
    return Running(model, made, RankScheduler(model, made, schedule, STEPS, layers=layers))  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_resumed_at_any_step_is_the_run_uninterrupted_bit_by_bit(
    name: str, optimizer: str
) -> None:
    whole, states = running(SCHEDULES[name], optimizer), []
    for step in range(STEPS + 1):
        states.append(whole.state())
        whole.steps(step, step + 1)
    for step, state in enumerate(states):
        resumed = running(SCHEDULES[name], optimizer)
        with torch.no_grad():
            for p in resumed.model.parameters():
                p.add_(1)  # its own weights must not matter
        resumed.load(state)
        assert_same_bits(resumed.state(), state)
        resumed.steps(step, STEPS + 1)
        assert_same_bits(resumed.state(), whole.state())


def test_the_saved_states_differ_from_step_to_step() -> None:
    run, seen = running(SCHEDULE), set()
    for step in range(STEPS):
        seen.add(str(run.state()))
        run.steps(step, step + 1)
    assert len(seen) == STEPS


def test_a_state_is_the_position_as_plain_data() -> None:
    run = running(SCHEDULE)
    run.steps(0, 5)
    state = run.ranks.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert {key: state[key] for key in ("last_step", "total_steps", "postponed")} == {
        "last_step": 5,
        "total_steps": STEPS,
        "postponed": {},
    }
    assert state["forms"] == {"0": {"form": "full-rank"}, "2": {"form": "full-rank"}}
    assert form_from_data(state["last_factored_forms"]["0"]) == LowRank(2)


@pytest.mark.parametrize("total_steps", [STEPS - 1, STEPS + 1, STEPS * 10])
def test_a_state_of_a_run_of_another_length_is_refused(total_steps: int) -> None:
    run = running(SCHEDULE)
    before = snapshot(run.model, run.optimizer)
    with pytest.raises(ValueError, match=f"run of {total_steps} steps, this one has {STEPS}"):
        run.ranks.load_state_dict({"last_step": 9, "total_steps": total_steps})
    assert snapshot(run.model, run.optimizer) == before
    assert run.ranks.last_step == 0


def test_a_run_can_go_back() -> None:
    run = running(SCHEDULE)
    run.steps(0, 3)
    saved = run.state()
    run.steps(3, STEPS)
    end = run.state()
    run.load(saved)
    assert forms(run.model) == [LOW, LOW, FULL]
    assert_same_bits(run.state(), saved)
    run.steps(3, STEPS)
    assert_same_bits(run.state(), end)


def test_loading_brings_the_model_to_the_saved_forms_whatever_was_done_to_it() -> None:
    run = running(SCHEDULE)
    run.steps(0, 3)
    state = run.ranks.state_dict()
    dr.inflate(run.model, optimizer=run.optimizer)
    run.ranks.load_state_dict(state)
    assert forms(run.model) == [LOW, LOW, FULL]


def test_a_monitor_reads_the_same_after_resuming() -> None:
    """A full-rank layer's lambda is taken at the rank that the layer last had."""
    schedule = Phases([0, 2, 4], [LowRank(2), LowRank(3), FULL])
    run, resumed = running(schedule, layers="*"), running(schedule, layers="*")
    run.steps(0, 6)
    resumed.load(run.state())
    assert SpectralMonitor(resumed.model).read() == SpectralMonitor(run.model).read()


# Resuming while a change is postponed.


def diverged(schedule: RankSchedule, steps: int) -> tuple[Running, list[dict[str, object]]]:
    """A run whose weight became NaN before a change, and its state at step 2."""
    run = running(schedule)
    run.steps(0, 2)
    saved = run.state()
    poison(run.model, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2, steps):
            one_step(run.ranks)
    return run, saved


def test_a_run_that_goes_back_does_not_wait_for_the_old_next_try() -> None:
    run, saved = diverged(SCHEDULE, 8)  # tried at 4, 5 and 7, next at 11
    run.load(saved)
    run.steps(2, 4)
    assert forms(run.model) == [FULL, FULL, FULL]


def test_a_run_that_diverged_after_a_change_can_go_back_before_it() -> None:
    run = running(SCHEDULE)
    run.steps(0, 2)
    saved = run.state()
    run.steps(2, 6)
    poison(run.model, math.nan)
    run.load(saved)
    assert_same_bits(run.state(), saved)


def test_a_state_saved_while_a_change_is_put_off_can_be_loaded() -> None:
    run, _ = diverged(SCHEDULE, 6)
    resumed = running(SCHEDULE)
    resumed.load(run.state())
    assert forms(resumed.model) == forms(run.model) == [FULL, LOW, FULL]
    assert resumed.ranks.state_dict() == run.ranks.state_dict()
    for one in (run, resumed):
        poison(one.model, 0.5)
    assert [bool(one_step(one.ranks)) for one in (run, resumed)] == [True, True]  # at step 7


def test_layers_that_only_a_plan_names_resume_too() -> None:
    def schedule(clock: Clock, readings: Readings) -> Plan:
        return {"0": LOW, "2": FULL if clock.step < 3 else Adapted(2)}

    run, resumed = running(schedule, layers="0"), running(schedule, layers="0")
    run.steps(0, 6)
    resumed.load(run.state())
    run.steps(6, STEPS)
    resumed.steps(6, STEPS)
    assert_same_bits(resumed.state(), run.state())
