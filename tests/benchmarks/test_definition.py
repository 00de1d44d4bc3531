"""Runs of what a problem was before are other runs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_experiment import DECAY, FULL, Tiny, experiment

from benchmarks.training.harness import evidence, worker
from benchmarks.training.harness.arm import Arm, named
from benchmarks.training.harness.definition import changed, defined, is_of, of_one_problem
from benchmarks.training.harness.record import Run
from benchmarks.training.harness.store import Store
from benchmarks.training.harness.summary import Summaries
from benchmarks.training.harness.worker import Worker
from benchmarks.training.problems.tabular import Table
from dynarank.schedules import decay

ONE_RATE = replace(FULL, rates=(1.0,))


def altered(name: str, value: Any) -> Tiny:
    """The problem with another attribute, its own or one of its data."""
    tiny = copy.copy(Tiny())
    if name == "data":
        tiny.parts = {**tiny.parts, value: [one + 1 for one in tiny.parts[value]]}
    elif name == "network":
        tiny.network = lambda width=1.0: torch.nn.Sequential(torch.nn.Linear(16, 2))
    else:
        setattr(tiny, name, value)
    return tiny


CHANGES = [
    ("rate", 0.02), ("steps", 30), ("batch_size", 4), ("weight_decay", 0.1), ("max_norm", 1.0),
    ("calibrated_on", 4), ("bf16", True), ("layers", ["0"]), ("network", None),
    ("drops", (0.6, 0.85)), ("weights", [[1, 2.0], [3, 4.0]]), ("labels", list(range(1000))),
    ("data", "train"), ("data", "valid"), ("data", "test"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_every_change_of_a_problem_makes_its_runs_others(name: str, value: Any) -> None:
    before, now = defined(Tiny()), defined(altered(name, value))
    run = {"problem": before}
    assert is_of(run, defined(Tiny())) and not is_of(run, now)
    assert name in changed([run], now)


def test_settings_are_as_in_a_record() -> None:
    now = defined(altered("max_norm", [1.0, float("inf")]))
    assert is_of({"problem": json.loads(json.dumps(now, allow_nan=False))}, now)
    assert len(json.dumps(defined(altered("labels", list(range(1000)))))) < 1500
    assert "source" not in defined(Table())


def test_one_other_label_is_other_data() -> None:
    tiny = Tiny()
    labels = tiny.parts["train"][1].clone()
    labels[tiny.indices(0, 0)[3]] += 1
    tiny.parts = {**tiny.parts, "train": [tiny.parts["train"][0], labels]}
    assert not is_of({"problem": defined(Tiny())}, defined(tiny))


def test_where_the_data_lies_is_no_setting() -> None:
    one, other = (altered("folder", f"/data/{name}") for name in "ab")
    assert defined(one) == defined(other) == defined(Tiny())


def test_sums_may_differ_by_rounding() -> None:
    problem = defined(Tiny())
    entries, total = problem["network"]
    assert is_of({"problem": problem}, {**problem, "network": [entries, total * (1 + 1e-7)]})
    assert not is_of({"problem": problem}, {**problem, "network": [entries, total * (1 + 1e-5)]})


def old(**other: Any) -> Run:
    """A record of the time before they said what the problem was."""
    flops = defined(Tiny())["flops"] * 40
    return {
        "setting": {"rate": 2.0}, "rate": 0.02, "length": 0.5, "steps": 20, "precision": "fp32",
        "flops": 0.5, "training_flops": flops // 2, **other,
    }  # fmt: skip


@pytest.mark.parametrize(
    "other", [{"rate": 0.04}, {"steps": 40}, {"precision": "bf16 autocast"}, {"training_flops": 1}]
)
def test_older_records_are_compared_in_what_they_say(other: dict[str, Any]) -> None:
    assert is_of(old(), defined(Tiny())) and not is_of(old(**other), defined(Tiny()))


def test_defining_a_problem_draws_nothing() -> None:
    torch.manual_seed(5)
    defined(Tiny())
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert drawn == torch.rand(())


def work(folder: Path, monkeypatch: pytest.MonkeyPatch, problem: Any, *arms: Arm) -> list[Run]:
    one = replace(experiment(ONE_RATE, *arms), problem=problem)
    monkeypatch.setattr(worker, "get", {"tiny": one}.__getitem__)
    Worker(["tiny"], folder, folder / "scratch", folder / "results").work()
    return Store("tiny", folder / "results").runs()


def test_a_changed_experiment_is_run_again_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(work(tmp_path, monkeypatch, Tiny)) == 3
    assert capfd.readouterr().err == ""
    runs = work(tmp_path, monkeypatch, lambda _: altered("weight_decay", 0.5))
    assert len(runs) == 6
    told = capfd.readouterr().err
    assert told.startswith("tiny: 3 runs on record do not count") and "(weight_decay)" in told
    found = Summaries("tiny", runs, experiment(ONE_RATE))
    assert found.arms["full rank"].runs == runs[4:] and found.others == 3
    assert of_one_problem(runs, defined(Tiny())) == runs[:3]


def test_an_experiment_with_another_method_is_run_again_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(work(tmp_path, monkeypatch, Tiny)) == 3
    monkeypatch.setattr(Tiny, "factor", lambda *_: 0.5)
    runs = work(tmp_path, monkeypatch, Tiny)
    assert len(runs) == 6
    assert "3 runs on record do not count" in (told := capfd.readouterr().err)
    assert told.endswith("has changed since (source)\n")
    assert Summaries("tiny", runs, experiment(ONE_RATE)).arms["full rank"].runs == runs[4:]


def test_an_arm_with_another_schedule_is_tuned_and_run_again_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before, now = (replace(DECAY, rates=(1.0,), schedule=decay(total=t)) for t in (0.7, 0.8))
    work(tmp_path, monkeypatch, Tiny, before)
    runs = work(tmp_path, monkeypatch, Tiny, now)
    assert [run["arm"] for run in runs[6:]] == ["decay"] * 3
    told = "tiny: 3 runs on record do not count: 'decay' has changed since (schedule)\n"
    assert capfd.readouterr().err == told
    found = Summaries("tiny", runs, experiment(ONE_RATE, now))
    words = "Not counted: runs of what these arms were before: decay (3)."
    assert words in evidence._unfinished(found)
    whole = Summaries("tiny", runs[:6], experiment(ONE_RATE, before))
    assert not any("Not counted" in one for one in evidence._unfinished(whole))


def test_without_the_data_the_last_problem_is_the_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def absent(_: Path) -> Tiny:
        raise FileNotFoundError("there is no such text")

    work(tmp_path, monkeypatch, Tiny)
    work(tmp_path, monkeypatch, lambda _: altered("weight_decay", 0.5))
    capfd.readouterr()
    assert len(work(tmp_path, monkeypatch, absent)) == 6  # all is done
    assert capfd.readouterr().err == ""
    store = Store("tiny", tmp_path / "results")
    store.path.write_text("".join(store.path.read_text().splitlines(keepends=True)[:5]))
    assert len(work(tmp_path, monkeypatch, absent)) == 5
    assert "tiny is left out: there is no such text" in capfd.readouterr().err


def _kept(rank: int) -> Any:
    return lambda: rank


def test_functions_are_named_with_what_they_hold() -> None:
    assert named(None) is None
    assert named(partial(int, base=2)) == "int(base=2)"
    assert named(_kept(8)) != named(_kept(4)) and "rank=8" in str(named(_kept(8)))
