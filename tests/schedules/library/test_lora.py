from __future__ import annotations

import pytest

from dynarank import Adapted
from dynarank.schedules import Clock, Readings, get_preset, lora, timeline

LAYERS = Readings({"a": (16, 16), "b": (16, 8, 3, 3)})


def test_every_layer_is_adapted_from_the_first_step_to_the_last() -> None:
    (phase,) = timeline(lora(4, alpha=2.0), LAYERS, 50)
    assert (phase.start, phase.stop) == (0, 50)
    assert phase.plan == dict.fromkeys("ab", Adapted(4, alpha=2.0))
    assert Adapted(4, alpha=2.0).scale == 0.5


def test_the_preset_uses_what_it_knows_and_ignores_the_rest() -> None:
    made = get_preset("lora")(rank=3, alpha=16.0, inflate=0.1, deflate=0.9, execution="two-branch")
    plan = made(Clock(0, 1), LAYERS)
    assert set(plan.values()) == {Adapted(3, alpha=16.0, execution="two-branch")}


def test_an_impossible_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        lora(0)
