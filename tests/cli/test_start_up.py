"""What a command imports, the version, completion, and the list of commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from command_line import call

import dynarank
from dynarank.cli import COMMANDS
from dynarank.schedules.catalog import SCHEDULES
from dynarank.train.recipes import load_recipe, recipe_names

LIGHT = [
    [],
    ["--help"],
    ["--version"],
    ["recipes"],
    ["recipes", "--json"],
    ["recipes", "--help"],
    ["schedules"],
    ["schedules", "--json"],
    ["--show-completion", "bash"],
    ["--show-completion", "zsh"],
    ["trian"],
]
_MAIN = """
import sys
from dynarank.cli import main
sys.argv = ["dynarank", *sys.argv[1:]]
try:
    main()
finally:
    print([name for name in ("torch", "numpy", "matplotlib") if name in sys.modules])
"""


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(dynarank.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
             **environment},
    )  # fmt: skip


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_what_needs_no_torch_does_not_import_it(words: list[str], tmp_path: Path) -> None:
    done = python("-c", _MAIN, *words, HOME=str(tmp_path))
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "Traceback" not in done.stderr


def test_the_shell_completes_commands_without_torch() -> None:
    done = python("-c", _MAIN, _DYNARANK_COMPLETE="complete_bash", COMP_WORDS="dynarank re",
                  COMP_CWORD="1")  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["report", "recipes"] and "[]" in done.stdout


def test_the_shell_completes_options_and_recipes() -> None:
    for words, at, found in (
        ("dynarank train --sched", "2", "--schedule"),
        ("dynarank train dig", "2", "digits"),
    ):
        done = python("-m", "dynarank", _DYNARANK_COMPLETE="complete_bash", COMP_WORDS=words,
                      COMP_CWORD=at)  # fmt: skip
        assert done.stdout.split() == [found]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_for_dynarank_however_it_was_called(shell: str) -> None:
    done = python("-m", "dynarank", "--show-completion", shell)
    assert done.returncode == 0
    assert "_DYNARANK_COMPLETE" in done.stdout and "python" not in done.stdout


def test_python_m_is_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    done = python("-m", "dynarank", "--version")
    assert (done.returncode, done.stdout) == (0, f"dynarank {dynarank.__version__}\n")


def test_every_command_is_listed_with_the_first_line_of_its_help() -> None:
    for name, summary in COMMANDS.items():
        function = getattr(import_module(f"dynarank.cli.{name}"), name)
        assert function.__doc__.splitlines()[0] == summary


def test_recipes_and_schedules_are_listed_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, names in (("recipes", recipe_names()), ("schedules", list(SCHEDULES))):
        assert call(monkeypatch, command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == names
        assert all(len(line.split()) > 3 for line in lines)
        assert call(monkeypatch, command, "--json") == 0
        assert list(json.loads(capsys.readouterr().out)) == names
    assert call(monkeypatch, "recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == {name: load_recipe(name).summary for name in recipe_names()}


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("trian digits", "'train'"),
        ("train dgits", "'digits'"),
        ("plan text-gtp", "'text-gpt'"),
        ("train digits --epoch 3", "--epochs"),
        ("train digits --schedule dynamic_rank", "'dynamic-rank'"),
        ("compare digits --schedules low-rank,dekay", "'decay'"),
        ("plan digits --schedule pufferfsh", "'pufferfish'"),
        ("plan digits --decomposition tuker", "'tucker'"),
        ("train digits --precision bf-16", "'bf16'"),
        ("train digits --log tensorbord", "'tensorboard'"),
        ("sweep digits --inflate 1 --deflate 2 --schedule dynamic-rank-lo", "'dynamic-rank-low'"),
        ("train digits --set learning-rat=0.1", "learning_rate"),
        ("probe digits --set epoch=3", "epochs"),
    ],
)
def test_the_nearest_name_is_suggested(
    words: str, near: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *words.split()) == 2
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert near in told and ("id you mean" in told or "Possible options" in told)
