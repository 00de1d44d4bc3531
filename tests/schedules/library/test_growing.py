"""InRank's rule: by traces computed by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from dynarank import LowRank, Rank
from dynarank.schedules import Answer, Clock, Growing, Readings, get_preset, growing
from dynarank.schedules.library.growing import explained
from dynarank.schedules.readings import SpectralReading

SHAPES = {"a": (8, 8)}


def reading(values: list[float]) -> SpectralReading:
    padded = tuple(values) + (0.0,) * (8 - len(values))
    return SpectralReading(1.0, 1.0, 1, 0.5, 1, 8, values=padded)


def follow(
    schedule: Growing, spectra: list[list[float] | None], total_steps: int = 9
) -> list[Answer]:
    """The answers, a reading at each step where there is one."""
    state, answers = schedule.start(), list[Answer]()
    for step, values in enumerate(spectra):
        seen = {} if values is None else {"a": reading(values)}
        answers.append(
            schedule.update(state, Clock(step, total_steps), Readings(SHAPES, spectra=seen))
        )
        state = json.loads(json.dumps(answers[-1].state))
    return answers


def grown(first: int, buffer: int, most: float, **options: Any) -> Growing:
    """Read at every step, growing from the second on, never ended, unless a test is about it."""
    settings = {"spectra_every": 1, "warmup": 0, "stop": None} | options
    return Growing(most, first=first, buffer=buffer, **settings)


def ranks(answers: list[Answer]) -> list[object]:
    return [answer.plan["a"].rank for answer in answers]  # type: ignore[union-attr]


def test_what_modes_explain_by_hand() -> None:
    """s = 4, 2, 1 and five zeros: var = 21/8 - (7/8)^2 = 1.859375; without 4 it is .484375."""
    shares = explained([4.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert shares[:4] == pytest.approx([0.0, 1 - 0.484375 / 1.859375, 1 - 0.109375 / 1.859375, 1.0])
    values = torch.rand(40, dtype=torch.float64).sort(descending=True).values
    for modes, share in enumerate(explained(values.tolist())):
        rest = values.clone()
        rest[:modes] = 0
        assert share == pytest.approx((1 - rest.var() / values.var()).item())
    assert explained([0.0, 0.0]) == [1.0, 1.0]


def test_a_trace_by_hand() -> None:
    """first 1, buffer 2, most 6, threshold 0.9, looked at from step 2 on, ended at step 6.

    ==== ===================== ============================ ===== ====
    step singular values        explained by 1, 2, 3 modes    modes rank
    ==== ===================== ============================ ===== ====
    0    4 2 1                  not looked at                1     3
    1    4 2 1                  not looked at (warm-up 1)    1     3
    2    4 2 1                  .739, .941                   2     4
    3    none                                                2     4
    4    4 3 2 1                      .779, .95              3     5
    5    4 4 4 4 4                          .2: no more room 3     5
    6    9 9 9 9 9              ended                        3     3
    ==== ===================== ============================ ===== ====
    """
    schedule = grown(1, 2, 6, warmup=1, stop=6)
    spectra = [
        [4.0, 2, 1],
        [4.0, 2, 1],
        [4.0, 2, 1],
        None,
        [4.0, 3, 2, 1],
        [4.0] * 5,
        [9.0] * 5,
        None,
    ]
    answers = follow(schedule, spectra)
    assert ranks(answers) == [3, 3, 4, 4, 5, 5, 3, 3]
    assert [answer.state["modes"]["a"] for answer in answers] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert [len(answer.decisions) for answer in answers] == [0, 0, 1, 0, 1, 0, 1, 0]
    (decision,) = answers[2].decisions
    assert (decision.step, decision.path, decision.form) == (2, "a", LowRank(4))
    assert decision.readings == pytest.approx(
        {"modes": 2, "explained": 1 - 0.109375 / 1.859375, "before": 1 - 0.484375 / 1.859375}
    )


def test_where_the_whole_buffer_is_not_enough_it_grows_by_the_buffer_less_one() -> None:
    """Five equal values, buffer 3: modes 1 -> 3 -> 4, below most - buffer = 5; rank 4, 6, 7."""
    answers = follow(grown(1, 3, 8), [None, [4.0] * 8, [4.0] * 5, [4.0] * 5])
    assert ranks(answers) == [4, 4, 6, 7]  # equal values have no variance: nothing to explain


def test_modes_that_explain_enough_stay() -> None:
    answers = follow(grown(2, 2, 8), [None, [4.0, 0.1], [4.0, 0.2, 0.1]])
    assert ranks(answers) == [4, 4, 4]
    assert not any(answer.decisions for answer in answers)


def test_no_room_no_growth_and_no_rank_above_the_most() -> None:
    answers = follow(grown(2, 100, Rank(0.5, of="min")), [[4.0, 3, 2, 1]] * 3)
    assert ranks(answers) == [4, 4, 4]


def test_each_layer_has_its_own_limits() -> None:
    schedule = growing(buffer=Rank(0.25, of="min"))
    layers = {"a": (64, 64), "b": (16, 8, 3, 3), "c": (2, 64)}
    plan = schedule.update(schedule.start(), Clock(0, 9), Readings(layers)).plan
    assert plan == {"a": LowRank(18), "b": LowRank(6), "c": LowRank(1)}


# What it does with readings that are not of use.


def test_a_reading_that_is_not_finite_or_of_another_layer_is_left_out() -> None:
    schedule = grown(1, 2, 6)
    for spectra in ({"a": reading([math.nan])}, {"b": reading([4.0, 2.0, 1.0])}):
        answer = schedule.update(schedule.start(), Clock(3, 9), Readings(SHAPES, spectra=spectra))
        assert answer.state == {"modes": {"a": 1}, "cut": False}


def test_a_reading_without_its_values_is_refused() -> None:
    schedule, short = grown(1, 2, 6), SpectralReading(1.0, 1.0, 1, 0.5, 1, 8, values=(1.0,))
    with pytest.raises(ValueError, match="all 8 singular values, the reading has 1"):
        schedule.update(schedule.start(), Clock(3, 9), Readings(SHAPES, spectra={"a": short}))


def test_the_state_given_stays_as_it_is() -> None:
    state: dict[str, Any] = {"modes": {"a": 1}, "cut": False}
    grown(1, 2, 6).update(
        state, Clock(3, 9), Readings(SHAPES, spectra={"a": reading([4.0, 2.0, 1.0])})
    )
    assert state == {"modes": {"a": 1}, "cut": False}


def test_the_preset_grows_to_the_rank_it_is_given() -> None:
    assert get_preset("growing")(rank=0.25, alpha=16.0, inflate=0.1) == growing(0.25)
    assert growing().rank == Rank(0.5, of="min")
    shape = {"a": (768, 3072)}
    plan = growing().update(growing().start(), Clock(0, 9), Readings(shape)).plan
    assert plan == {"a": LowRank(102)}  # 2 + 100 of 768, as InRank has of GPT-2


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 1.0}, {"threshold": 0.0}, {"spectra_every": 0}, {"spectra_every": 1.5},
        {"warmup": -1}, {"stop": 1.5}, {"stop": 0}, {"first": 0}, {"buffer": 2.0},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lies in|share|at least 1|is a step"):
        growing(**options)
