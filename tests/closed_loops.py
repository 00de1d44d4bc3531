"""Closed-loop schedules: readings, answers step by step, and strategies for hypothesis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import hypothesis.strategies as st

from dynarank import Adapted, FullRank, LowRank
from dynarank.forms import Form, Rank
from dynarank.schedules import Answer, Clock, ClosedLoop, Decision, Readings, closed_loop
from dynarank.schedules.readings import SpectralReading

LOW, FULL = LowRank(8), FullRank()
LAYERS = {"a": (64, 64), "b": (64, 64)}
Spectra = Mapping[str, SpectralReading]


def reading(effective: float, stable: float, rank: int = 10) -> SpectralReading:
    return SpectralReading(effective, stable, 5, 0.9, rank=rank, full_rank=64)


def answers(
    schedule: ClosedLoop,
    spectra: Mapping[int, Spectra] | list[Spectra],
    total_steps: int = 100,
    forms: Mapping[str, Form] | None = None,
) -> Iterator[Answer]:
    """One answer for every step; ``spectra`` by step, or one after another from the first."""
    given = dict(enumerate(spectra)) if isinstance(spectra, list) else spectra
    state = schedule.start()
    for step in range(total_steps):
        clock = Clock(step, total_steps)
        answer = schedule.update(
            state, clock, Readings(LAYERS, forms=forms or {}, spectra=given.get(step, {}))
        )
        state = answer.state
        yield answer


NUMBERS = st.floats(0, 64) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e308, 5e-324])
READINGS = st.builds(reading, NUMBERS, NUMBERS, st.integers(1, 64))
CALM = st.builds(reading, st.floats(5, 10), st.floats(3, 3.3))  # many rules are met
SPECTRA = st.lists(
    st.dictionaries(st.sampled_from(sorted(LAYERS)), READINGS | CALM | CALM, max_size=2),
    max_size=60,
)
SCHEDULES = st.builds(
    closed_loop,
    st.just(8),
    fall=st.floats(0.01, 0.5),
    saturation=st.floats(0.5, 0.99),
    settled=st.floats(0.001, 0.5),
    smoothing=st.floats(0, 0.9),
    patience=st.integers(1, 3),
    warmup=st.integers(0, 10) | st.floats(0, 0.3),
    cooldown=st.integers(0, 10) | st.floats(0, 0.3),
    hysteresis=st.floats(1, 3),
    most_changes=st.integers(0, 6),
    last_inflation=st.none() | st.floats(0.3, 1.0),
    to=st.sampled_from(["low-rank", "adapted"]),
)

FORMS: list[Form] = [FULL, LOW, LowRank(Rank(0.5, "min")), Adapted(0.25, "cp", 3.0)]
DECISIONS = st.lists(
    st.builds(
        Decision,
        st.integers(0, 59),
        st.sampled_from(sorted(LAYERS)),
        st.sampled_from(FORMS),
        st.text(max_size=5),
        st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), max_size=2),
    ),
    max_size=8,
    unique_by=lambda d: (d.step, d.path),
)
