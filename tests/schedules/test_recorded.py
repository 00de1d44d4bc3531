"""Recorded decisions repeated, and decided again from what was read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from closed_loops import DECISIONS, LAYERS, SCHEDULES, SPECTRA, answers, reading
from hypothesis import given, settings

from dynarank import FullRank, LowRank
from dynarank.forms import Form
from dynarank.records import DecisionRecord, LayerSpectrum, SpectrumRecord
from dynarank.schedules import (
    Clock,
    ClosedLoop,
    Decision,
    Readings,
    Replay,
    closed_loop,
    decide_again,
    replay,
    spectra_from_records,
    timeline,
)
from dynarank.schedules.readings import SpectralReading

LOW, FULL = LowRank(8), FullRank()
QUICK = settings(deadline=None, max_examples=60)


def lines(decisions: list[Decision]) -> list[dict[str, Any]]:
    """As a run's records.jsonl holds them."""
    records = [DecisionRecord(epoch=d.step / 7, **d.to_data()) for d in decisions]
    return [json.loads(record.model_dump_json()) for record in records]


@QUICK
@given(DECISIONS, st.permutations(range(8)))
def test_each_form_holds_from_its_decision_to_the_next(
    decisions: list[Decision], order: list[int]
) -> None:
    shuffled = [decisions[i] for i in order if i < len(decisions)]
    schedule = replay(shuffled, LOW)
    assert schedule == replay(lines(shuffled), LOW)
    expected: dict[str, Form] = dict.fromkeys(LAYERS, LOW)
    for step in range(60):
        expected |= {d.path: d.form for d in decisions if d.step == step}
        assert schedule(Clock(step, 60), Readings(LAYERS)) == expected
    phases = timeline(schedule, Readings(LAYERS), 60)
    assert phases[-1].plan == expected


@QUICK
@given(SCHEDULES, SPECTRA)
def test_a_replayed_loop_is_the_loop(
    schedule: ClosedLoop, spectra: list[dict[str, SpectralReading]]
) -> None:
    run = list(answers(schedule, spectra, 60))  # type: ignore[arg-type]
    decisions = [d for answer in run for d in answer.decisions]
    repeated = replay(lines(decisions), schedule.low)
    for step, answer in enumerate(run):
        assert repeated(Clock(step, 60), Readings(LAYERS)) == answer.plan


@QUICK
@given(SCHEDULES, SPECTRA)
def test_the_rule_decides_the_same_from_the_record(
    schedule: ClosedLoop, spectra: list[dict[str, SpectralReading]]
) -> None:
    """Through JSON, figures that are not finite included."""
    records = [
        SpectrumRecord(
            epoch=0, step=i, layers={p: LayerSpectrum(**vars(r)) for p, r in one.items()}
        )
        for i, one in enumerate(spectra)
    ]
    read = spectra_from_records([json.loads(record.model_dump_json()) for record in records])
    decisions = [d for answer in answers(schedule, spectra, 60) for d in answer.decisions]  # type: ignore[arg-type]
    every = replace(schedule, spectra_every=1)  # as they were given
    assert decide_again(every, LAYERS, 60, read, before=schedule.low) == decisions
    assert list(replay(lines(decisions), LOW).decisions) == sorted(decisions, key=lambda d: d.step)


def test_a_change_that_came_late_is_taken_into_account() -> None:
    """Readings before it was made are skipped, as they were in the run."""
    schedule = closed_loop(
        8, patience=1, smoothing=0.0, warmup=1, cooldown=0, to="low-rank", most_changes=2
    )
    spectra = {step: {"a": reading(9.9, 3.0)} for step in range(6)}  # at 0 of the weight as built
    prompt = decide_again(schedule, LAYERS, 10, spectra)
    assert [d.step for d in prompt] == [1, 3]
    late = decide_again(schedule, LAYERS, 10, spectra, changes={3: {"a": FULL}})
    assert [d.step for d in late] == [1, 5]


def test_spectra_of_other_steps_than_those_asked_for_are_left_out() -> None:
    schedule = closed_loop(8, patience=1, smoothing=0.0, warmup=1, cooldown=0, spectra_every=3)
    spectra = {step: {"a": reading(9.9, 3.0)} for step in range(11)}
    assert [d.step for d in decide_again(schedule, LAYERS, 20, spectra)] == [3, 9]
    lacking = {step: one for step, one in spectra.items() if step % 3}
    assert decide_again(schedule, LAYERS, 20, lacking) == []


def test_what_is_read_after_the_last_step_is_decided_by_too() -> None:
    schedule = closed_loop(8, patience=1, smoothing=0.0, warmup=1, last_inflation=None)
    spectra = {step: {"a": reading(9.9 if step == 4 else 9.0, 3.0)} for step in range(5)}
    (decision,) = decide_again(schedule, LAYERS, 4, spectra)
    assert decision.step == 3  # the clock stands still


def test_other_records_are_left_out() -> None:
    others = [{"kind": "epoch", "epoch": 1.0}, {"kind": "phase", "step": 3}]
    assert spectra_from_records(others) == {}
    decision = Decision(3, "a", FULL, "a rule", {"x": 1.5})
    assert replay([*others, *lines([decision])], LOW) == Replay(LOW, (decision,))


def test_the_first_spectra_of_a_step_are_those_before_its_changes() -> None:
    layer = {**vars(reading(9.0, 3.0)), "values": [1.0, 0.5]}
    records = [
        {"kind": "spectrum", "step": 4, "layers": {"a": layer}},
        {"kind": "spectrum", "step": 4, "layers": {"a": {**layer, "effective_rank": 1.0}}},
    ]
    assert spectra_from_records(records)[4]["a"].effective_rank == 9.0
    assert spectra_from_records(records)[4]["a"].values == (1.0, 0.5)


def test_a_decision_about_an_unknown_layer_is_refused() -> None:
    schedule = replay([Decision(5, "c", FULL, "a rule")], LOW)
    with pytest.raises(ValueError, match="step 5 is about the layer 'c', which is not scheduled"):
        schedule(Clock(0, 10), Readings(LAYERS))


def test_a_decision_of_an_unknown_form_is_refused() -> None:
    line = {**lines([Decision(5, "a", FULL, "")])[0], "form": {"form": "half-rank"}}
    with pytest.raises(ValueError, match="unknown form 'half-rank'"):
        replay([line], LOW)
