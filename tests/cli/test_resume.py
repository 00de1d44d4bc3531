"""Commands lose nothing: interrupted, killed, repeated, twice at once, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from safetensors.torch import load_file

import dynarank
from dynarank.files.atomic import replacing
from dynarank.files.ownership import owned
from dynarank.records import SummaryRecord, read_run

SMALL = ["--epochs", "2", "--train-limit", "192", "--test-limit", "60"]
ONE = ["train", "digits", *SMALL, "--schedule", "dynamic-rank"]
LONG = ["--epochs", "200", "--schedule", "low-rank,dynamic-rank"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DYNARANK_DATA", raising=False)
    return tmp_path


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; its exit code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        code = call(monkeypatch, *words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@contextmanager
def started(*words: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, which is killed at the end."""
    environment = {**os.environ, "PYTHONPATH": str(Path(dynarank.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "dynarank", *words],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(ready: Callable[[], object], process: subprocess.Popen[str]) -> None:
    for _ in range(2000):
        if ready():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("nothing happened")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def without_times(summary: SummaryRecord | None) -> dict[str, Any]:
    assert summary is not None
    return summary.model_dump(exclude={"train_seconds", "wall_seconds"})


# The same command again.


def test_a_finished_command_says_so_and_prints_its_result_again(run: Any, here: Path) -> None:
    _, first, _ = run(*ONE, "--out", "one", "--json")
    before = contents(here / "one")
    code, again, _ = run(*ONE, "--out", "one", "--json")
    one, two = json.loads(first), json.loads(again)
    assert code == 0 and one["runs"] == two["runs"]
    assert (one["finished_before"], two["finished_before"]) == ([], ["one"])
    assert contents(here / "one") == before
    code, out, _ = run(*ONE, "--out", "one")
    assert code == 0 and "Finished already" in out and "dynamic-rank" in out and "epoch 1/" not in out
    code, out, _ = run("train", "--resume", "one")
    assert code == 0 and "Finished already" in out


OTHER = {
    "epochs": (["--epochs", "3"], "epochs: 2 there, 3 now"),
    "seed": (["--seed", "1"], "seed: 0 there, 1 now"),
    "limit": (["--train-limit", "128"], "train_limit: 192 there, 128 now"),
    "rank": (["--rank", "4"], "recipe.rank: .* there, 4 now"),
    "schedule": (["--schedule", "low-rank"], "schedules: .*dynamic-rank.* there, .*low-rank.* now"),
    "noise": (["--noise"], "noise: False there, True now"),
}


@pytest.mark.parametrize("how", ["--out", "--resume"])
def test_other_settings_are_refused_with_both_values_and_nothing_changes(
    how: str, run: Any, here: Path
) -> None:
    import re

    assert run(*ONE, "--out", "one")[0] == 0
    before = contents(here / "one")
    for words, told in OTHER.values():
        code, _, err = run(*ONE, *words, how, "one")
        assert code == 2 and re.search(told, err) and "--out" in err, err
        assert contents(here / "one") == before
