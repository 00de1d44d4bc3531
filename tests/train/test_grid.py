"""Many runs in one folder: each is made once, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import call

from dynarank.cli.sweep import grid, parse_epochs
from dynarank.files.ownership import owned
from dynarank.files.reading import DamagedFileError
from dynarank.files.sealed_json import sealed, unsealed
from dynarank.records import find_runs, read_run
from dynarank.train.grid import Job, find, open_folder, read_common, run_jobs
from dynarank.train.recipes import RecipeError, load_recipe

SMALL = ["--epochs", "2", "--train-limit", "192", "--test-limit", "60"]
pytestmark = pytest.mark.usefixtures("no_page")


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


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path: Path, mark: bytes) -> None:
    """Flip one bit of the first byte after a mark."""
    data = bytearray(path.read_bytes())
    data[data.index(mark) + len(mark)] ^= 1
    path.write_bytes(data)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


DAMAGE = {  # a finished run that cannot be read, or is not what was written
    "records, no JSON": lambda run: flip(run / "records.jsonl", b'"summary"'),
    "records, another score": lambda run: flip(run / "records.jsonl", b'"test_score":0.'),
    "records, zeros": lambda run: (run / "records.jsonl").write_bytes(b"\0" * 9000),
    "records, empty": lambda run: (run / "records.jsonl").write_bytes(b""),
    "config, no JSON": lambda run: flip(run / "config.json", b'"seed"'),
    "config, another number": lambda run: flip(run / "config.json", b'"train_size": '),
    "config, another seed": lambda run: flip(run / "config.json", b'"seed": '),
    "config, cut": lambda run: cut(run / "config.json", 0.5),
    "config, gone": lambda run: (run / "config.json").unlink(),
    "weights, gone": lambda run: (run / "model.safetensors").unlink(),
    "weights, cut": lambda run: cut(run / "model.safetensors", 0.9),
    "weights, a flipped bit": lambda run: flip(run / "model.safetensors", b"]}}"),
}
TWO = ("--schedules", "full-rank,low-rank", "--seeds", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of two schedules over two seeds."""
    folder = tmp_path_factory.mktemp("compare") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "compare", "digits", *SMALL, *TWO, "--out", str(folder)) == 0
    return folder


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_cannot_be_read_is_moved_aside_whole_and_trained_again(
    damage: str, runs: Path, finished: Path
) -> None:
    place, said = runs / "seed1" / "low-rank", list[str]()
    job = Job(place, load_recipe("digits"), "low-rank", 1)
    assert find(job, {"epochs": 2}).state == "finished"
    DAMAGE[damage](place)
    (place / "notes.txt").write_text("mine")
    before = snapshot(place)

    def train(job: Job) -> None:
        assert not find(job, {"epochs": 2}).run
        shutil.copytree(finished / "seed1" / "low-rank", job.folder, dirs_exist_ok=True)

    ((done, run),) = run_jobs([job], train, {"epochs": 2}, said.append)
    assert done is job and run.summary is not None
    assert snapshot(place.with_name("low-rank.aside")) == before
    assert "low-rank.aside" in said[0] and str(place) in said[0]
    assert len(find_runs(runs)) == 4  # the report passes over what was moved aside


def test_a_run_whose_checkpoints_cannot_be_read_is_moved_aside_too(
    runs: Path, finished: Path
) -> None:
    place, said = runs / "seed1" / "low-rank", list[str]()
    (place / "records.jsonl").unlink()
    job, before = Job(place, load_recipe("digits"), "low-rank", 1), snapshot(place)

    def train(job: Job) -> None:
        if (place / "config.json").exists():
            raise DamagedFileError(place / "checkpoints", "every checkpoint is damaged")
        shutil.copytree(finished / "seed1" / "low-rank", place, dirs_exist_ok=True)

    ((_, run),) = run_jobs([job], train, {"epochs": 2}, said.append)
    assert run.summary is not None and "every checkpoint is damaged" in said[0]
    assert snapshot(place.with_name("low-rank.aside")) == before

    def refused(job: Job) -> None:
        raise DamagedFileError(runs.parent / "data.npz", "it is cut")  # not of the run

    (place / "records.jsonl").unlink()
    with pytest.raises(DamagedFileError, match="it is cut"):
        list(run_jobs([job], refused, {"epochs": 2}, said.append))
    assert place.exists() and not place.with_name("low-rank.aside-2").exists()


def test_compare_trains_a_run_again_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    score = read_run(runs / "seed1" / "low-rank").summary.test_score  # type: ignore[union-attr]
    cut(runs / "seed1" / "low-rank" / "model.safetensors", 0.9)
    others = {name: data for name, data in snapshot(runs).items() if "seed1/low" not in name}
    arguments = ["compare", "digits", *SMALL, *TWO, "--out", str(runs), "--json"]
    assert call(monkeypatch, *arguments) == 0
    out, err = capsys.readouterr()
    assert "low-rank.aside" in err and "model.safetensors" in err
    again, after = json.loads(out), snapshot(runs)
    assert again["schedules"]["low-rank"]["scores"][1] == score
    assert len(again["finished_before"]) == 3
    assert all(after[name] == data for name, data in others.items() if "report" not in name)


def test_fields_of_a_newer_version_are_not_asked_for(runs: Path) -> None:
    config = runs / "seed0" / "low-rank" / "config.json"
    known = json.loads(unsealed(config.read_bytes()))
    config.write_text(sealed(json.dumps({**known, "color": "blue"})))
    records = config.with_name("records.jsonl")
    first, *rest = records.read_bytes().splitlines(keepends=True)
    newer = sealed(json.dumps({**json.loads(unsealed(first.strip())), "color": "blue"}))
    records.write_bytes(b"".join([newer.encode() + b"\n", *rest]))
    job = Job(config.parent, load_recipe("digits"), "low-rank", 0)
    assert find(job, {"epochs": 2}).state == "finished"


ANOTHER = {  # a run that is there, and is not the one of its folder
    "seed 1 copied from seed 0": ("seed0/low-rank", "seed1/low-rank", "seed: 0 there, 1 now"),
    "a swapped schedule": ("seed0/low-rank", "seed0/full-rank", "schedule: low-rank there, full"),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_another_run_is_refused_by_name_and_not_pooled(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    source, place, told = ANOTHER[case]
    shutil.rmtree(runs / place)
    shutil.copytree(runs / source, runs / place)
    before = snapshot(runs)
    assert call(monkeypatch, "compare", "digits", *SMALL, *TWO, "--out", str(runs)) == 2
    err = capsys.readouterr().err
    assert told in err and str(runs / place) in err and "--out" in err
    assert snapshot(runs) == before


@pytest.mark.parametrize("name", ["letter.txt", "config.json", ".git/config", "sub/records.jsonl"])
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = tmp_path / "runs" / "seed0" / "low-rank"
    (place / name).parent.mkdir(parents=True)
    (place / name).write_text('{"model_type": "bert"}')
    (place / "photo.jpg").write_text("x")
    before = snapshot(tmp_path)
    arguments = ["compare", "digits", *SMALL, *TWO, "--out", str(tmp_path / "runs")]
    assert call(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert str(place) in err and "not of a run" in err and "photo.jpg" in err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["", "seed1/low-rank"])
def test_a_folder_that_another_process_writes_to_is_refused(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    cut(runs / "seed1" / "low-rank" / "records.jsonl", 0.8)
    with owned(runs / place):
        before = snapshot(runs)
        assert call(monkeypatch, "compare", "digits", *SMALL, *TWO, "--out", str(runs)) == 2
        assert str(os.getpid()) in capsys.readouterr().err
        assert snapshot(runs) == before


def test_damaged_settings_are_moved_aside_and_each_run_is_checked_by_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    cut(runs / "common.json", 0.5)
    before = (runs / "common.json").read_bytes()
    other = ["compare", "digits", "--epochs", "3", *SMALL[2:], *TWO, "--out", str(runs)]
    assert call(monkeypatch, *other) == 2
    assert "epochs: 2 there, 3 now" in capsys.readouterr().err
    assert (runs / "common.json.aside").read_bytes() == before
    assert call(monkeypatch, "compare", "digits", *SMALL, *TWO, "--out", str(runs)) == 0
    assert "Finished already" in capsys.readouterr().out


def test_settings_of_a_newer_version_are_kept(tmp_path: Path) -> None:
    open_folder(tmp_path, {"epochs": 2, "of_a_newer_version": 1})
    open_folder(tmp_path, {"epochs": 2})
    open_folder(tmp_path, {"epochs": 2})
    assert read_common(tmp_path) == {"epochs": 2, "of_a_newer_version": 1}


@pytest.mark.parametrize("kind", ["empty", "folder", "device"])
def test_settings_that_are_not_ours_are_refused_and_left(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = tmp_path / "common.json"
    {
        "empty": place.touch,
        "folder": place.mkdir,
        "device": lambda: place.symlink_to("/dev/zero"),  # without an end
    }[kind]()
    assert call(monkeypatch, "train", "digits", *SMALL, "--out", str(tmp_path)) == 2
    assert "move it away" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["common.json"]
    assert call(monkeypatch, "train", "--resume", str(tmp_path)) == 2
    assert "repeat the command with --out" in capsys.readouterr().err


def test_runs_on_other_data_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} two three four\n" * 3000)
    shutil.copy(tmp_path / "one.txt", tmp_path / "same.txt")
    words = ["compare", "text-gpt", "--epochs", "1", "--train-limit", "64", "--test-limit", "8",
             "--schedules", "low-rank", "--seeds", "1",
             "--out", str(tmp_path / "runs")]  # fmt: skip
    assert call(monkeypatch, *words, "--data", str(tmp_path / "one.txt")) == 0
    before = snapshot(tmp_path / "runs" / "seed0")
    capsys.readouterr()
    assert call(monkeypatch, *words, "--data", str(tmp_path / "two.txt")) == 2
    assert "data_digest: " in capsys.readouterr().err
    (tmp_path / "runs" / "common.json").unlink()  # then the run itself says so
    assert call(monkeypatch, *words, "--data", str(tmp_path / "two.txt")) == 2
    assert "data_digest: " in capsys.readouterr().err
    assert snapshot(tmp_path / "runs" / "seed0") == before
    assert call(monkeypatch, *words, "--data", str(tmp_path / "same.txt")) == 0


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
