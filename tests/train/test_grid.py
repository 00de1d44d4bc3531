"""Many runs in one folder: each is made once, whatever happens in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import call

from dynarank.cli.sweep import grid, parse_epochs
from dynarank.records import read_run
from dynarank.train.grid import Job, finished, open_folder, run_jobs
from dynarank.train.recipes import RecipeError, load_recipe

SMALL = ["--epochs", "2", "--train-limit", "192", "--test-limit", "60"]


def compare(monkeypatch: pytest.MonkeyPatch, capsys: Any, out: Path, *more: str) -> dict[str, Any]:
    arguments = ["compare", "digits", *SMALL, "--out", str(out), "--json", *more]
    assert call(monkeypatch, *arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_a_finished_run_is_never_made_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    two = ("--schedules", "full-rank,low-rank")
    first = compare(monkeypatch, capsys, tmp_path, *two, "--seeds", "1")
    assert [first["schedules"][name]["n"] for name in ("full-rank", "low-rank")] == [1, 1]
    assert "cannot be compared" in first["sentences"][1]
    cut = tmp_path / "seed0" / "low-rank" / "records.jsonl"
    kept = tmp_path / "seed0" / "full-rank" / "records.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:-2]))  # as if interrupted
    before = kept.stat().st_mtime_ns, kept.read_bytes()
    again = compare(monkeypatch, capsys, tmp_path, *two, "--seeds", "2")
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == before
    assert [again["schedules"][name]["n"] for name in ("full-rank", "low-rank")] == [2, 2]
    for name in ("full-rank", "low-rank"):  # a run made again is the same run
        scores = [one["schedules"][name]["scores"][0] for one in (first, again)]
        assert scores[0] == scores[1]
        assert again["schedules"][name]["sd"] is not None
    assert Path(again["report"]).is_file()
    stored = read_run(tmp_path / "seed1" / "low-rank").summary
    assert stored is not None
    assert again["schedules"]["low-rank"]["scores"][1] == stored.test_score


def test_runs_with_other_settings_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    open_folder(tmp_path, {"epochs": 3, "recipe": {"name": "digits"}})
    open_folder(tmp_path, {"epochs": 3, "recipe": {"name": "digits"}})
    with pytest.raises(RecipeError, match=r"epochs: 3 there, 4 now.*--out"):
        open_folder(tmp_path, {"epochs": 4, "recipe": {"name": "digits"}})
    assert call(monkeypatch, "compare", "digits", *SMALL, "--out", str(tmp_path)) == 2
    assert "contains runs with other settings" in capsys.readouterr().err


def test_the_remains_of_a_run_are_removed(tmp_path: Path) -> None:
    recipe = load_recipe("digits")
    job = Job(tmp_path / "one", recipe, "full-rank", 0)
    job.folder.mkdir()
    (job.folder / "records.jsonl").write_text('{"kind": "run", "rec')
    (job.folder / "stale").write_text("")
    made: list[Job] = []
    assert finished(job.folder) is None
    assert list(run_jobs([job], made.append)) == []  # the run came to no end either
    assert made == [job] and not (job.folder / "stale").exists()


def test_a_sweep_draws_its_grid_and_can_be_refined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ["sweep", "digits", *SMALL, "--out", str(tmp_path), "--json"]
    assert call(monkeypatch, *common, "--inflate", "10", "--deflate", "20,25") == 0
    coarse = json.loads(capsys.readouterr().out)
    assert [(c["inflate"], c["deflate"]) for c in coarse["cells"]] == [(10, 20), (10, 25)]
    folder = tmp_path / "inflate10-deflate20" / "seed0" / "records.jsonl"
    before = folder.stat().st_mtime_ns
    assert call(monkeypatch, *common, "--inflate", "10:22:12", "--deflate", "20,25") == 0
    fine = json.loads(capsys.readouterr().out)
    assert len(fine["cells"]) == 3 and folder.stat().st_mtime_ns == before
    assert all(len(cell["scores"]) == 1 for cell in fine["cells"])
    assert [Path(p).suffix for p in fine["pictures"]] == [".png", ".svg"]
    assert all(Path(p).stat().st_size > 1000 for p in fine["pictures"])


@pytest.mark.parametrize("text", ["", "a", "1:2", "5:1:1", "1:5:0", "1:5:-1", "1,,2"])
def test_epochs_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="FROM:TO:STEP"):
        parse_epochs(text)


def test_a_grid_holds_only_schedules() -> None:
    assert grid([10.0, 20.0], [15.0, 20.0, 30.0], 30) == [(10, 15), (10, 20)]
    with pytest.raises(RecipeError, match="no pair of --inflate"):
        grid([20.0], [10.0], 30)


def test_a_sweep_of_a_schedule_without_moments_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", "digits", "--inflate", "5", "--deflate", "10", "--schedule", "low-rank"]
    assert call(monkeypatch, *arguments) == 2
    assert "dynamic-rank-low, got 'low-rank'" in capsys.readouterr().err
