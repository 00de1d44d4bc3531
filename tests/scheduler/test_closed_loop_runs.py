"""The closed loop in a run: read, decided, applied, saved, resumed, replayed, decided again."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
from small_run import net, sgd, train_step
from torch import nn

import dynarank as dr
from dynarank import FullRank, LowRank
from dynarank.forms import Form
from dynarank.schedules import (
    Answer,
    Clock,
    ClosedLoop,
    RankSchedule,
    Readings,
    State,
    closed_loop,
    decide_again,
    replay,
)
from dynarank.schedules.readings import SpectralReading

STEPS = 40
LOOP = closed_loop(
    2, fall=0.02, saturation=0.99, settled=0.05, smoothing=0.3, patience=2, warmup=4, cooldown=6,
    most_changes=4, hysteresis=1.1, last_inflation=None, spectra_every=2, to="low-rank",
)  # fmt: skip


class Watched(RankSchedule):
    """The loop, with the spectra it is given and the forms it is told of written down."""

    def __init__(self, schedule: ClosedLoop) -> None:
        self.schedule = schedule
        self.requires, self.spectra_every = schedule.requires, schedule.spectra_every
        self.spectra: dict[int, Mapping[str, SpectralReading]] = {}
        self.forms: dict[int, Mapping[str, Form]] = {}

    def start(self) -> State:
        return self.schedule.start()

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        if readings.spectra:
            self.spectra[clock.step] = readings.spectra
            self.forms[clock.step] = dict(readings.forms)
        return self.schedule.update(state, clock, readings)


def began(schedule: RankSchedule) -> tuple[nn.Module, Any, dr.RankScheduler]:
    model = net()
    optimizer = sgd(model, lr=0.2)
    return model, optimizer, dr.RankScheduler(model, optimizer, schedule, STEPS)


def trained(schedule: RankSchedule) -> tuple[nn.Module, dr.RankScheduler]:
    model, optimizer, ranks = began(schedule)
    for step in range(STEPS):
        train_step(model, optimizer, step)
        ranks.step()
    return model, ranks


def same(one: nn.Module, other: nn.Module) -> bool:
    two = dict(other.named_parameters())
    return {n: p.tolist() for n, p in one.named_parameters()} == {
        n: p.tolist() for n, p in two.items()
    }


def test_the_loop_decides_in_a_run_and_the_forms_follow() -> None:
    seen: list[list[Form]] = []
    model, optimizer, ranks = began(LOOP)
    for step in range(STEPS):
        train_step(model, optimizer, step)
        ranks.step()
        seen.append([dr.current_plan(model)[path] for path in ranks.layers])
    assert len({d.path for d in ranks.decisions}) == 2
    assert {d.form for d in ranks.decisions} == {FullRank(), LowRank(2)}
    for i, path in enumerate(ranks.layers):
        for step in range(STEPS):
            made = [d.form for d in ranks.decisions if d.path == path and d.step <= step + 1]
            assert seen[step][i] == (made[-1] if made else LowRank(2))
    assert all(d.step % 2 == 0 for d in ranks.decisions)  # only where spectra were read


def test_the_weight_as_it_was_built_is_no_reading_of_the_low_rank_one() -> None:
    """Before the first plan is applied a layer is full-rank, and so is its spectrum."""
    watched = Watched(LOOP)
    _, _, ranks = began(watched)
    assert watched.forms[0] == dict.fromkeys(ranks.layers, FullRank())
    state = ranks.state_dict()["schedule"]["layers"]
    for path in ranks.layers:
        assert state[path]["skipped"] == 1
        assert state[path]["evidence"]["effective_rank"] is None


def test_replaying_the_decisions_is_the_same_run_bit_by_bit() -> None:
    model, ranks = trained(LOOP)
    data = json.loads(json.dumps([d.to_data() for d in ranks.decisions]))
    again, _ = trained(replay(data, LOOP.low))
    assert ranks.decisions and same(model, again)
    other, _ = trained(replay(data[:-1], LOOP.low))
    assert not same(model, other)


def test_the_decisions_follow_from_what_was_read() -> None:
    watched = Watched(LOOP)
    _, ranks = trained(watched)
    sites = {path: (8, 8) for path in ranks.layers}
    assert decide_again(LOOP, sites, STEPS, watched.spectra) == ranks.decisions
    assert ranks.decisions


@pytest.mark.parametrize("stop", [0, 3, 8, 9, 13, 20, 21, 33])
def test_a_run_resumed_goes_on_as_if_it_had_not_stopped(stop: int) -> None:
    whole, ranks = trained(LOOP)
    model, optimizer, first = began(LOOP)
    for step in range(stop):
        train_step(model, optimizer, step)
        first.step()
    saved = json.loads(json.dumps(first.state_dict()))
    weights = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())

    model, optimizer, second = began(LOOP)
    second.load_state_dict(saved)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    for step in range(stop, STEPS):
        train_step(model, optimizer, step)
        second.step()
    assert second.decisions == ranks.decisions
    assert same(model, whole)


def test_a_layer_that_is_not_finite_is_left_as_it_is() -> None:
    model, optimizer, ranks = began(LOOP)
    for step in range(20):
        train_step(model, optimizer, step)
        up = model[0].up  # type: ignore[index]
        kept = up.detach().clone()
        up.data.fill_(float("nan"))
        ranks.step()
        up.data.copy_(kept)
    state = ranks.state_dict()["schedule"]["layers"]["0"]
    assert state["skipped"] == 11 and state["changes"] == 0
    assert {d.path for d in ranks.decisions} == {"2"}
