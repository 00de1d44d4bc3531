from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from damage import mutated
from hypothesis import given, settings
from torch import nn

from dynarank import Adapted, FullRank, LowRank
from dynarank.cost.flops import trace
from dynarank.cost.timing import (
    Cache,
    Timings,
    candidates,
    default_cache,
    layer_timer,
    measure,
    where_faster,
)
from dynarank.schedules import Clock, Readings, dynamic_rank

# The times themselves are the machine's affair: what is asserted is what is timed, kept and chosen.

FACTORED, JOINED = LowRank(4, execution="factored"), LowRank(4, execution="joined")
MERGED, TWO = Adapted(4, execution="merged"), Adapted(4, execution="two-branch")


def net() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(20, 16),
        nn.Linear(16, 16),
        nn.Unflatten(1, (4, 2, 2)),
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.ConvTranspose2d(8, 8, 2, stride=2),
    )


def test_every_form_and_execution_of_every_layer_is_timed() -> None:
    use = trace(net(), torch.randint(20, (6,)))
    before = torch.random.get_rng_state()
    plans = [dict.fromkeys(("0", "1", "4"), LowRank(2)) | {"3": Adapted(1)}, {"1": Adapted(2)}]
    timings = measure(use, plans, rounds=1)
    assert {path: len(found) for path, found in timings.seconds.items()} == {
        "0": 3, "1": 5, "3": 3, "4": 3,
    }  # fmt: skip
    assert all(s > 0 for found in timings.seconds.values() for s in found.values())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("low", "kept"), [(0.9, FACTORED), (0.99, FullRank()), (1.0, FullRank()), (2.0, FullRank())]
)
def test_a_layer_that_is_not_faster_stays_full_rank(low: float, kept: object) -> None:
    timings = Timings({"a": {FullRank(): 1.0, FACTORED: low, JOINED: 3.0, MERGED: 2.0, TWO: 1.5}})
    assert timings.choose("a", LowRank(4)) == kept
    assert timings.choose("a", Adapted(4)) == TWO  # what trains is not changed
    assert timings.choose("a", FullRank()) == FullRank()
    assert timings.choose("b", LowRank(4)) == LowRank(4)  # not timed, not touched
    with pytest.raises(KeyError, match="was not timed"):
        timings.of("a", LowRank(5))


def test_a_schedule_where_faster() -> None:
    slow = {FullRank(): 1.0, FACTORED: 2.0, JOINED: 2.0, MERGED: 1.0, TWO: 2.0}
    fast = slow | {FACTORED: 0.5}
    schedule = where_faster(
        dynamic_rank(4, inflate=0.4, deflate=0.8), Timings({"a": slow, "b": fast})
    )
    readings = Readings({"a": (8, 8), "b": (8, 8)})
    assert schedule.update({}, Clock(0, 10), readings).plan == {"a": FullRank(), "b": FACTORED}
    assert schedule.update({}, Clock(5, 10), readings).plan == {"a": FullRank(), "b": FullRank()}
    assert schedule.update({}, Clock(9, 10), readings).plan == {"a": MERGED, "b": MERGED}


def test_candidates_are_the_executions_left_open() -> None:
    assert candidates(LowRank(4)) == [FACTORED, JOINED]
    assert candidates(Adapted(4)) == [MERGED, TWO]
    assert candidates(JOINED) == [JOINED] and candidates(FullRank()) == [FullRank()]


def test_answers_are_kept_and_not_measured_again(tmp_path: Path) -> None:
    use = trace(nn.Sequential(nn.Linear(16, 16)), torch.ones(4, 16))
    file = tmp_path / "deep" / "timings.json"
    first = measure(use, [{"0": LowRank(4)}], rounds=1, cache=file)
    again = measure(use, [{"0": LowRank(4)}], rounds=1, cache=file)
    assert again == first
    known = json.loads(file.read_text())
    file.write_text(json.dumps(dict.fromkeys(known, 7.0)))
    assert set(measure(use, [{"0": LowRank(4)}], cache=file).seconds["0"].values()) == {7.0}
    other = measure(use, [{"0": LowRank(4)}], rounds=1, cache=file, autocast=torch.bfloat16)
    assert 7.0 not in other.seconds["0"].values()  # another precision is another question


BROKEN = ["", "{", "[1]", '{"a": ', "\x00", "7", "[" * 100_000, '{"a": 1.0, "a": 2.0}']
BROKEN += [f'{{"a": {x}}}' for x in ('"1"', "NaN", "-1.0", "true", "[1.0]", "1e999", "0")]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: ascii(content[:12]))
def test_a_broken_file_of_answers_counts_as_empty_and_is_replaced(
    tmp_path: Path, content: str
) -> None:
    file = tmp_path / "timings.json"
    file.write_text(content)
    use = trace(nn.Sequential(nn.Linear(32, 32)), torch.ones(4, 32))
    with pytest.warns(UserWarning, match=r"timings\.json cannot be read: .*; all layers are timed"):
        first = measure(use, [{"0": LowRank(4)}], rounds=1, cache=file)
    again = measure(use, [{"0": LowRank(4)}], rounds=1, cache=file)  # no warning
    assert again.seconds == first.seconds


def test_answers_that_cannot_be_stored_end_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    use = trace(nn.Sequential(nn.Linear(32, 32)), torch.ones(4, 32))
    with pytest.warns(UserWarning, match="the timings are not cached: "):
        measure(use, [{"0": LowRank(4)}], rounds=1, cache=tmp_path / "file" / "timings.json")


@settings(deadline=None, max_examples=100)
@given(mutated(b'{"cpu|2.0|Linear": 0.25, "cpu|2.0|Conv2d": 1e-05}'))
def test_damaged_files_of_answers_are_read_or_ignored(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.mktemp("cache") / "timings.json"
    file.write_bytes(data)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        known = Cache(file).known
    assert all(0 < seconds < float("inf") for seconds in known.values())
    assert len(told) <= 1 and (known == {} or not told)


def test_the_file_of_answers_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DYNARANK_CACHE", str(tmp_path))
    assert default_cache() == tmp_path / "timings.json"


def test_a_timer_takes_the_fastest_execution() -> None:
    use = trace(nn.Sequential(nn.Linear(16, 16)), torch.ones(4, 16))
    timer = layer_timer(use)
    assert 0 < timer("0", LowRank(4)) <= timer("0", FACTORED)
