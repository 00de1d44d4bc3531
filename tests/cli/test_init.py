"""``dynarank init`` writes what runs, and every command takes a recipe of one's own."""

from __future__ import annotations

import json
import re
import signal
import tomllib
from pathlib import Path

import pytest
from command_line import call
from own_recipes import write

from dynarank.records import read_run
from dynarank.train.recipes import Recipe, load_recipe
from dynarank.train.run_checkpoints import RunCheckpoints


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("python", [False, True])
def test_what_it_writes_runs_as_it_is(
    python: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["init", "my-net.toml", *(["--python"] if python else [])]
    assert call(monkeypatch, *words) == 0
    assert {path.name for path in here.iterdir()} == {"my-net.toml"} | (
        {"my_net.py"} if python else set()
    )
    assert "dynarank train my-net.toml" in capsys.readouterr().out
    words = ["train", "my-net.toml", "--epochs", "1", "--schedule", "low-rank", "--out", "run"]
    assert call(monkeypatch, *words, "--train-limit", "128") == 0
    assert read_run(here / "run").summary is not None


def test_every_default_in_the_comments_is_the_default(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "init", "a.toml") == 0
    plain = load_recipe("a.toml")
    shown = re.findall(r"^# (\w+) = ([^#\n]+)", (here / "a.toml").read_text(), re.MULTILINE)
    chosen = {"layers", "loss", "metric", "higher_is_better"}  # by the network and the targets
    values = {key: tomllib.loads(f"{key} = {value}")[key] for key, value in shown}
    assert len(values) > 10 and values.keys() <= Recipe.model_fields.keys()
    assert plain.with_settings({k: v for k, v in values.items() if k not in chosen}) == plain


def test_nothing_is_overwritten(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "a.py").write_text("mine")
    assert call(monkeypatch, "init", "a.toml", "--python") == 2
    assert "a.py exists already and is not overwritten" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["a.py"]
    assert call(monkeypatch, "init", "a.toml") == 0
    before = (here / "a.toml").read_text()
    assert call(monkeypatch, "init", "a.toml") == 2
    assert (here / "a.toml").read_text() == before
    for name, told in (("a.py", "a recipe is a .toml file"), ("no/a.toml", "does not exist")):
        assert call(monkeypatch, "init", name) == 2
        assert told in capsys.readouterr().err


def test_commands_take_it_and_a_stopped_run_goes_on_from_another_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = here / "home"
    home.mkdir()
    path = write(home, "noisy", 'batch_size = 12\nrank = 8\nschedules = ["net.py:late"]')
    assert call(monkeypatch, "plan", str(path), "--schedule", "late", "--json") == 0
    assert json.loads(capsys.readouterr().out)["schedule"] == "late"
    out = str(here / "compared")
    words = ["--schedules", "low-rank,late", "--seeds", "1", "--epochs", "1", "--out", out]
    assert call(monkeypatch, "compare", str(path), *words) == 0
    words = ["--inflate", "0.5", "--deflate", "1", "--out", str(here / "swept")]
    assert call(monkeypatch, "sweep", str(path), *words) == 0
    assert call(monkeypatch, "train", str(path), "--out", str(here / "whole")) == 0

    due, steps = RunCheckpoints.due, list[int]()

    def stop(self: RunCheckpoints, *, event: bool = False) -> bool:
        steps.append(1)
        if len(steps) == 7:
            signal.raise_signal(signal.SIGINT)
        return due(self, event=event)

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "due", stop)
        assert call(patch, "train", str(path), "--out", str(here / "stopped")) == 130
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    code = (home / "net.py").read_text()
    (home / "net.py").write_text(code + "\n# another\n")
    assert call(monkeypatch, "train", "--resume", str(here / "stopped")) == 2
    assert "net.py has changed since the run began" in capsys.readouterr().err
    (home / "net.py").write_text(code)
    assert call(monkeypatch, "train", "--resume", "../stopped") == 0
    weights = [(here / n / "model.safetensors").read_bytes() for n in ("whole", "stopped")]
    assert weights[0] == weights[1]


WRONG = [
    ["--decomposition", "svdd"],
    ["--budget", "0.001"],
    ["--rank", "1000"],
    ["--schedule", "full-rank,low-rnak"],
    ["--schedule", "full-rank,net.py:late"],
    ["--train-limit", "73"],
    ["--test-limit", "21"],
    ["--precision", "fp8"],
    ["--device", "tpu"],
    ["--data", "somewhere"],
    ["--log", "nothing"],
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_is_wrong_trains_and_writes_nothing(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(here, more='batch_size = 12\nschedules = ["full-rank", "low-rank"]')
    before = {path.name for path in here.iterdir()}
    assert call(monkeypatch, "train", path.name, *words) == 2
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == before


@pytest.mark.parametrize("words", [["--schedule", "full-rank,low-rank", "--budget", "0.001"],
                                   ["--schedule", "full-rank,decay", "--budget", "0.001"],
                                   ["--schedule", "full-rank", "--decomposition", "svdd"],
                                   ["--schedule", "full-rank", "--budget", "3"]])  # fmt: skip
def test_built_in_recipes_are_checked_too(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "train", "digits", "--train-limit", "64", *words) == 2
    assert not list(here.iterdir())


def test_letters_of_any_script_stay_in_the_name_of_the_module(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "init", "моя сеть-2.toml", "--python") == 0
    assert {path.name for path in here.iterdir()} == {"моя сеть-2.toml", "моя_сеть_2.py"}
    assert load_recipe("моя сеть-2.toml").model == "моя_сеть_2.py:network"


def test_a_folder_is_no_file_to_write(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "init", ".") == 2
    assert ". is a folder; name the file to write, recipe.toml" in capsys.readouterr().err
