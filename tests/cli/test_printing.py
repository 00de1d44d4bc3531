"""What commands print: in any width and encoding, piped, quiet, and without a place for figures."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest
from command_line import call
from own_recipes import own

from dynarank.cli.encoding import any_encoding
from dynarank.cli.show import console

SMALL = ["--epochs", "2", "--train-limit", "128", "--test-limit", "60"]
COMMANDS = {
    "train": ["train", "digits", *SMALL, "--schedule", "full-rank,decay,dynamic-rank-low"],
    "compare": ["compare", "digits", *SMALL, "--seeds", "2", "--schedules",
                "decay,dynamic-rank-low"],
    "sweep": ["sweep", "digits", *SMALL, "--inflate", "5,10", "--deflate", "20,25"],
    "probe": ["probe", "digits", "--train-limit", "640", "--seeds", "1", "--share", "0.001"],
    "plan": ["plan", "digits"],
    "recipes": ["recipes"],
    "schedules": ["schedules"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("dynarank.train.probe.FEWEST", 10)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_line_fits_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    if command in ("recipes", "schedules"):
        monkeypatch.setattr("dynarank.cli.listing.console", lambda: _terminal())
    assert call(monkeypatch, *COMMANDS[command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def _terminal() -> object:
    out = console()
    out._force_terminal = True
    return out


def test_narrow_lines_are_wrapped_at_whole_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *COMMANDS["compare"]) == 0
    whole = capsys.readouterr().out.split("Accuracy:")[1].split("Runs:")[0]
    monkeypatch.setenv("COLUMNS", "50")
    assert call(monkeypatch, *COMMANDS["compare"]) == 0
    narrow = capsys.readouterr().out.split("Accuracy:")[1].split("Runs:")[0]
    assert max(map(len, narrow.splitlines())) <= 50 and narrow.split() == whole.split()


def test_a_pipe_gets_sentences_and_names_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    long = here / ("a-folder-with-a-long-name-" * 6)
    assert call(monkeypatch, *COMMANDS["compare"], "--out", str(long)) == 0
    out = capsys.readouterr().out
    assert f"Runs: {long}; report: {long / 'report.html'}\n" in out


def test_changes_are_told_once_an_epoch_by_train_and_not_at_all_by_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *COMMANDS["train"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("decay: ")]
    epochs = [line for line in told if "test accuracy" in line]
    changes = [line for line in told if " -> " in line]
    assert len(epochs) == 2 and 0 < len(changes) <= 4 and set(told) == {*epochs, *changes}
    assert call(monkeypatch, *COMMANDS["compare"]) == 0
    assert " -> " not in capsys.readouterr().out


def test_what_an_encoding_lacks_is_written_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "cp1252", "latin-1", "cp437"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert call(patch, *COMMANDS["compare"], "--out", "Größe") == 0
        stream.flush()
        out = stream.buffer.getvalue().decode(encoding)
        assert ("± " if encoding != "ascii" else "+- ") in out
        assert ("Größe" if encoding != "ascii" else "Gr\\xf6\\xdfe") in out
        assert "decay" in out and "---" in out


def test_a_closed_stdout_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert call(monkeypatch, *COMMANDS["plan"]) == 0


def test_a_name_that_is_not_utf_8_is_escaped(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"runs-\xff")
    words = ["train", "digits", *SMALL, "--schedule", "full-rank", "--out", name]
    assert call(monkeypatch, *words) == 0
    assert "Run folder: runs-\\udcff" in capfd.readouterr().out
    assert call(monkeypatch, *words, "--json") == 0
    assert json.loads(capfd.readouterr().out)["folder"] == name
    assert call(monkeypatch, "report", f"{name}/nothing") == 2
    assert "runs-\\udcff" in capfd.readouterr().err


def test_the_streams_are_given_back() -> None:
    before = sys.stdout.errors
    with pytest.raises(KeyError), any_encoding():
        raise KeyError
    assert sys.stdout.errors == before


@pytest.mark.parametrize("command", ["train", "compare", "sweep", "probe"])
def test_quiet_prints_the_result_only(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *COMMANDS[command], "--quiet") == 0
    said = capsys.readouterr()
    assert said.out.strip() and "epoch 1/" not in said.out
    assert " runs of " not in said.out and not said.err
    assert call(monkeypatch, *COMMANDS[command], "--quiet", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) and not said.err


def test_a_figure_that_cannot_be_written_costs_the_figure_not_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    """As in a folder that has become read-only during the run."""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    one = ["train", "digits", *SMALL, "--schedule", "full-rank", "--out", "one"]
    for words, figure, what in (
        (one, "one/report.html", "report.html"),
        ([*COMMANDS["sweep"], "--out", "all"], "all/sweep.png", "figure"),
    ):
        (here / figure).mkdir(parents=True)
        assert call(monkeypatch, *words) == 0
        said = capsys.readouterr()
        assert f"no {what}: " in said.err and str(figure) in said.err
        assert "accuracy" in said.out and "Traceback" not in said.err


def test_a_report_in_a_read_only_folder_says_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "run/report.html")

    monkeypatch.setattr("dynarank.cli.report.write_report", refuse)
    assert call(monkeypatch, "report", "run") == 2
    error = capsys.readouterr().err
    assert "Read-only file system; name another file with --out: 'run/report.html'" in error
    assert call(monkeypatch, "report", "run", "--out", "x.html") == 2
    assert "--out" not in capsys.readouterr().err


def test_settings_from_the_command_line_are_those_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    words = ["train", "digits", *SMALL, "--schedule", "low-rank", "--out", "one", "--quiet"]
    changed = ["--lr", "0.05", "--batch-size", "32", "--set", "optimizer=adamw",
               "--set", "rank.value=0.25", "--set", "decay_at=[20, 25]"]  # fmt: skip
    assert call(monkeypatch, *words, *changed) == 0
    recipe = json.loads((here / "one" / "config.json").read_text())["recipe"]
    assert (recipe["learning_rate"], recipe["batch_size"]) == (0.05, 32)
    assert (recipe["optimizer"], recipe["rank"]["value"]) == ("adamw", 0.25)
    assert recipe["decay_at"] == [20, 25]
    assert call(monkeypatch, *words, *changed) == 0  # the same run
    capsys.readouterr()
    assert call(monkeypatch, *words, "--lr", "0.1") == 2
    assert "recipe.learning_rate: 0.05 there, 0.1 now" in capsys.readouterr().err
    plan = ["plan", "digits", "--schedule", "low-rank", "--json"]
    assert call(monkeypatch, *plan) == 0
    whole = json.loads(capsys.readouterr().out)["relative_training_flops"]
    assert call(monkeypatch, *plan, "--set", "rank.value=0.125") == 0
    assert json.loads(capsys.readouterr().out)["relative_training_flops"] < whole


@pytest.mark.parametrize("words", [["plan"], ["train", "--epochs", "1"]])
def test_what_own_code_prints_is_apart_from_json(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = 'def printing():\n    print("called")\n    return tensors()\n'
    own(tmp_path, "printing", code=code)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words, "my.toml", "--schedule", "low-rank", "--json") == 0
    said = capfd.readouterr()
    assert json.loads(said.out) and "called" in said.err
