"""What was counted besides is of one schedule and one problem, and lies beside its records."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from tiny_experiment import DECAY, FULL, Tiny, experiment, record

from benchmarks.training.harness import calibration, replay, summary, worker
from benchmarks.training.harness.store import Store
from benchmarks.training.harness.summary import Summaries
from benchmarks.training.harness.worker import Worker

RUN = {**record(), "schedule": {"kind": "decay"}}


def test_a_count_is_of_one_folder_and_of_what_it_follows_from(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    calibration.add("a", RUN, 0.25, folder)
    assert calibration.share("a", {**RUN, "seed": 3}, folder) == 0.25
    assert calibration.share("a", RUN, tmp_path) is None
    assert calibration.share("b", RUN, folder) is None


@pytest.mark.parametrize(
    "other",
    [
        {"schedule": {"kind": "phases"}}, {"batches": 8}, {"by_data": False}, {"penalty": "soft"},
        {"steps": 30}, {"training_flops": 200}, {"arm": "decay"},
    ],
)  # fmt: skip
def test_of_another_schedule_or_problem_nothing_is_counted(tmp_path: Path, other: dict) -> None:
    calibration.add("a", RUN, 0.25, tmp_path)
    assert calibration.share("a", RUN, tmp_path) == 0.25
    assert calibration.share("a", {**RUN, **other}, tmp_path) is None


def _add(folder: Path, who: int) -> None:
    for number in range(20):
        calibration.add("a", {**RUN, "arm": f"{who} {number}"}, 0.5, folder)


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_add, args=(tmp_path, who)) for who in (0, 1)]
    for one in others:
        one.start()
    for one in others:
        one.join()
    names = [f"{who} {number}" for who in (0, 1) for number in range(20)]
    assert all(calibration.share("a", {**RUN, "arm": name}, tmp_path) == 0.5 for name in names)


def test_calibrations_are_counted_beside_new_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = experiment(FULL, DECAY, tuning=())
    for module in (worker, replay, summary):
        monkeypatch.setattr(module, "get", {"tiny": tiny}.__getitem__)
    Worker(["tiny"], tmp_path, tmp_path / "scratch", tmp_path / "results").work()
    results = tmp_path / "results"
    assert [run["arm"] for run in replay.missing("tiny", results)] == ["decay"]
    assert replay.measure(["tiny"], tmp_path, results)
    assert (Summaries("tiny", folder=results).further("decay") or 0) > 0
    assert replay.missing("tiny", results) == []
    assert len(Store("tiny", results).runs()) == 4


def test_arms_of_what_the_problem_was_before_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, results = experiment(DECAY, tuning=()), tmp_path / "results"
    for module in (worker, replay, summary):
        monkeypatch.setattr(module, "get", {"tiny": tiny}.__getitem__)
    Worker(["tiny"], tmp_path, tmp_path / "scratch", results).work()
    assert replay.measure(["tiny"], tmp_path, results)
    before = Summaries("tiny", folder=results).further("decay")
    monkeypatch.setattr(Tiny, "calibrated_on", 4)
    (results / "calibration.json").rename(tmp_path / "aside.json")
    calibration._shares.cache_clear()
    assert not replay.measure(["tiny"], tmp_path, results)
    assert "tiny: 1 arms are on record of what the problem was" in capsys.readouterr().err
    (tmp_path / "aside.json").rename(results / "calibration.json")
    calibration._shares.cache_clear()
    Worker(["tiny"], tmp_path, tmp_path / "scratch", results).work()
    found = Summaries("tiny", folder=results)
    assert found.others == 4 and found.further("decay") is None
    assert replay.measure(["tiny"], tmp_path, results)
    assert Summaries("tiny", folder=results).further("decay") < before


def test_what_cannot_be_counted_is_named_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(_: Path) -> Tiny:
        raise FileNotFoundError("there is no such text")

    tiny = experiment(FULL)
    object.__setattr__(tiny, "problem", absent)
    monkeypatch.setattr(replay, "get", {"tiny": tiny}.__getitem__)
    monkeypatch.setattr(replay, "missing", lambda *_: [RUN])
    assert not replay.measure(["tiny"], tmp_path, tmp_path)
    assert "tiny is left out: there is no such text" in capsys.readouterr().err
