"""Cuttlefish's rule: by a trace computed by hand, and against the rule spelled out in numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dynarank import FullRank, LowRank
from dynarank.schedules import (
    Answer,
    Clock,
    Cuttlefish,
    Readings,
    State,
    cuttlefish,
    get_preset,
    timeline,
)
from dynarank.schedules.library.cuttlefish import mean_slope
from dynarank.schedules.readings import SpectralReading

FULL = FullRank()


def reading(stable_rank: float, full_rank: int = 16) -> SpectralReading:
    return SpectralReading(stable_rank, stable_rank, 1, 0.5, 1, full_rank)


def follow(
    schedule: Cuttlefish, shapes: dict[str, tuple[int, ...]], ranks: dict[str, Sequence[float]]
) -> list[Answer]:
    """The answers to one reading a step."""
    state, answers = schedule.start(), list[Answer]()
    for step in range(len(next(iter(ranks.values())))):
        spectra = {path: reading(values[step]) for path, values in ranks.items()}
        before = json.dumps(state)
        answers.append(schedule.update(state, Clock(step, 99), Readings(shapes, spectra=spectra)))
        assert json.dumps(state) == before  # the state given stays as it is
        state = json.loads(json.dumps(answers[-1].state))  # and is plain data
    return answers


def test_a_trace_by_hand() -> None:
    """Window 3 (weight 1/2), slopes over 2 readings, threshold 0.3, x1.1 for two, x1.2 for one.

    ======= ======================================== ============================== =============
    reading a: t, average, slope                      c: t, average, slope           left, settles
    ======= ======================================== ============================== =============
    0       8, 8                                     6, 6
    1       6, 7                                     8, 7
    2       5, 6                                     6, 6.5
    3       5, 5.5, (.75 + .5) / 2 = .625             8, 7.25, (.125 + .75) / 2      3 (.30): b
    4       5, 5.25, (.375 + .25) / 2 = .3125         6, 6.625, (.0625 + .625) / 2   2 (.33): a
    5       5, 5.125                                 8, 7.3125, (.0313 + .6875) / 2 1 (.36): c
    6       the ranks: 5/8 of 32 = 20                4/6 of 16 = 10.7, up to 11
    ======= ======================================== ============================== =============

    b stands still at 4 from the first reading on: all of 16, where factors are not cheaper.
    """
    schedule = Cuttlefish(1, window=3, recent=2, threshold=0.3, relaxed=(1.1, 1.2))
    shapes = {"a": (32, 64), "b": (16, 16), "c": (16, 8, 3, 3)}
    ranks = {
        "a": [8.9, 6.2, 5.0, 5.7, 5.99, 5.5, 5.1, 3.0],
        "b": [4.0, 4.4, 4.9, 4.1, 4.2, 4.0, 4.7, 4.0],
        "c": [6.1, 8.5, 6.3, 8.8, 6.6, 8.0, 4.9, 9.0],
    }
    answers = follow(schedule, shapes, ranks)
    settled = [answer.state["settled"] for answer in answers[:6]]
    assert settled == [[], [], [], ["b"], ["a", "b"], ["a", "b", "c"]]
    assert answers[4].state["smooth"] == {
        "a": [6, 5.5, 5.25], "b": [4, 4, 4], "c": [6.5, 7.25, 6.625],
    }  # fmt: skip
    assert all(answer.plan == dict.fromkeys("abc", FULL) for answer in answers[:6])
    found = {"a": LowRank(20), "b": FULL, "c": LowRank(11)}
    assert [answer.plan for answer in answers[6:]] == [found, found]  # and that is that
    assert [len(answer.decisions) for answer in answers] == [0, 0, 0, 0, 0, 0, 3, 0]
    one, two, _ = answers[6].decisions
    assert (one.path, one.step, one.form) == ("a", 6, LowRank(20))
    assert one.readings == {"stable_rank": 5, "stable_rank_at_start": 8, "rank": 20}
    assert "not be cheaper" in two.reason and two.readings["rank"] == 16


def by_numpy(history: dict[str, list[int]], window: int, recent: int) -> int | None:
    """The reading at which the low-rank network begins: the rule of the published code."""
    settled = dict.fromkeys(history, False)
    for at in range(len(next(iter(history.values())))):
        if all(settled.values()):
            return at
        left = sum(not done for done in settled.values())
        threshold = 0.1 * (2.5 if left == 2 else 5.0 if left == 1 else 1.0)
        for path, ranks in history.items():
            if at < window or settled[path]:
                continue
            smooth = [float(ranks[0])]
            for rank in ranks[1 : at + 1]:
                smooth.append(rank * 2 / (window + 1) + smooth[-1] * (1 - 2 / (window + 1)))
            slopes = np.abs(np.gradient(np.array(smooth)))
            settled[path] = bool(np.mean(slopes[-recent:]) <= threshold)
    return None


@settings(max_examples=60, deadline=None)
@given(data=st.data(), layers=st.integers(1, 4), window=st.integers(5, 15))
def test_it_switches_when_the_published_rule_does(
    data: st.DataObject, layers: int, window: int
) -> None:
    """Ranks that fall and then rest, over random readings."""
    recent = data.draw(st.integers(1, window - 1))
    history: dict[str, list[int]] = {}
    for layer in range(layers):
        rest = data.draw(st.integers(3, 40))
        falls = data.draw(st.lists(st.integers(0, 2), min_size=60, max_size=60))
        level, ranks = 60, list[int]()
        for at, fall in enumerate(falls):
            level -= fall if at < rest else 0
            ranks.append(max(level, 1))
        history[f"layer{layer}"] = ranks
    shapes = dict.fromkeys(history, (64, 64))
    answers = follow(Cuttlefish(1, window=window, recent=recent), shapes, dict(history))  # type: ignore[arg-type]
    switched = next((i for i, answer in enumerate(answers) if "ranks" in answer.state), None)
    assert switched == by_numpy(history, window, recent)
    if switched is None:
        return
    for path, ranks in history.items():
        rank = min(math.ceil(ranks[switched] * 64 / ranks[0] - 1e-9), 64)
        expected = LowRank(rank) if rank * 128 < 64 * 64 else FULL
        assert answers[switched].plan[path] == expected


def test_the_defaults_are_the_published_ones() -> None:
    assert cuttlefish(7) == Cuttlefish(
        7, window=15, recent=11, threshold=0.1, relaxed=(2.5, 5.0), decomposition="svd"
    )
    assert cuttlefish().spectra_every == 1 / 300


# What it does with readings that are not of use.


def test_between_readings_nothing_moves() -> None:
    schedule = Cuttlefish(10)
    state: State = {**schedule.start(), "count": 3}
    answer = schedule.update(state, Clock(5, 99), Readings({"a": (8, 8)}))
    assert answer == ({"a": FULL}, state, ())


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_reading_that_is_not_finite_or_lacks_a_layer_is_no_reading(bad: float | None) -> None:
    schedule = Cuttlefish(1)
    spectra = {"a": reading(3.0)} | ({} if bad is None else {"b": reading(bad)})
    readings = Readings({"a": (8, 8), "b": (8, 8)}, spectra=spectra)
    answer = schedule.update(schedule.start(), Clock(0, 9), readings)
    assert answer.state == schedule.start()


def test_a_weight_of_zeros_at_the_start_and_ranks_that_rise_stay_within_the_limit() -> None:
    schedule = Cuttlefish(1, window=1, recent=1, threshold=9.0)
    answers = follow(schedule, {"a": (8, 64)}, {"a": [0.0, 7.0, 7.0, 7.0]})
    assert answers[-1].plan == {"a": FULL}  # 7 times the start: the whole rank, no factors
    tall = follow(schedule, {"a": (2, 64)}, {"a": [1.0, 1.0, 1.0, 1.0]})
    assert tall[-1].plan == {"a": FULL}


def test_without_spectra_it_never_switches() -> None:
    (phase,) = timeline(cuttlefish(1), Readings({"a": (8, 8)}), 50)
    assert phase.plan == {"a": FULL}


def test_slopes_by_hand() -> None:
    """|2 - 5| / 2, |2 - 4| / 2 and |2 - 2|; of two values |4 - 5|."""
    assert mean_slope([5.0, 4.0, 2.0, 2.0]) == pytest.approx((1.5 + 1 + 0) / 3)
    assert mean_slope([5.0, 4.0]) == 1.0


def test_the_preset_uses_what_it_knows() -> None:
    made = get_preset("cuttlefish")
    assert made(rank=0.5, decomposition="tucker") == cuttlefish(decomposition="tucker")
    assert made(epoch=0.125) == cuttlefish(0.125)  # a reading an epoch
    assert made(epoch=0.125, spectra_every=7) == cuttlefish(7)


@pytest.mark.parametrize(
    "options",
    [{"spectra_every": 0}, {"spectra_every": 1.5}, {"spectra_every": -1}]
    + [{"spectra_every": 1, name: value} for name, value in
       [("window", 0), ("recent", 0), ("threshold", -1.0), ("relaxed", (0.5, 2.0))]],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least|spectra_every"):
        Cuttlefish(**options)
