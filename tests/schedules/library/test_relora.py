from __future__ import annotations

from typing import Any

import pytest

from dynarank import Adapted, FullRank
from dynarank.schedules import Clock, Readings, get_preset, low_rank, relora, timeline

LAYERS = Readings({"a": (16, 16), "b": (16, 8, 3, 3)})


def test_the_published_twenty_thousand_steps_by_hand() -> None:
    """Full-rank for 5,000 steps; then adapters from 5,000, 10,000 and 15,000 on."""
    phases = timeline(relora(), LAYERS, 20_000)
    assert [phase.start for phase in phases] == [0, 5_000, 10_000, 15_000]
    forms = [phase.plan["a"] for phase in phases]
    adapter = Adapted(128, alpha=32.0)
    assert forms == [
        FullRank(),
        adapter,
        *(Adapted(128, alpha=32.0, restart=n) for n in (1, 2)),
    ]
    assert adapter.scale == 0.25
    assert relora().rewarmup == 100


def test_a_trace_in_steps_by_hand() -> None:
    """Warm start 2, every 3: full, full, then three steps of each adapter."""
    schedule = relora(4, warm_start=2, every=3)
    numbers = [schedule(Clock(t, 10), LAYERS)["b"] for t in range(10)]
    seen = [getattr(form, "restart", "full") for form in numbers]
    assert seen == ["full", "full", 0, 0, 0, 1, 1, 1, 2, 2]


def test_a_trace_in_shares_by_hand() -> None:
    """Of 10 steps a warm start of 0.25 is step 2 (rounded), an adapter of 0.3 lasts 3."""
    schedule = relora(4, warm_start=0.25, every=0.3)
    starts = [phase.start for phase in timeline(schedule, LAYERS, 10)]
    assert starts == [0, 2, 5, 8]


def test_an_adapter_shorter_than_a_step_lasts_one() -> None:
    schedule = relora(4, warm_start=0, every=0.001)
    assert [p.plan["a"].restart for p in timeline(schedule, LAYERS, 4)] == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_without_a_warm_start_the_first_adapter_begins_at_once() -> None:
    assert relora(4, warm_start=0)(Clock(0, 9), LAYERS)["a"] == Adapted(4, alpha=32.0)


def test_it_recommends_the_methods_other_two_parts() -> None:
    assert (relora().moments, relora().rewarmup) == ("prune", 100)
    assert (low_rank().moments, low_rank().rewarmup) == (None, None)


def test_the_preset_uses_what_it_knows() -> None:
    made = get_preset("relora")(rank=4, alpha=8.0, inflate=0.1, deflate=0.9)
    assert made == relora(4, alpha=8.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, r"every=1\.5"),
        ({"every": -0.1}, "every=-0.1"),
        ({"warm_start": 1.5}, r"1\.5"),
        ({"warm_start": -1}, "-1"),
        ({"rewarmup": -1}, "rewarmup"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        relora(4, **options)
