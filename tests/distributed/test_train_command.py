"""``torchrun -m dynarank train``: the run of one process, written once, whatever ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import call
from warm_python import Started

from dynarank.records import EpochRecord, PhaseRecord, Run, read_run

RECIPE = """
data = "digits"
model = "mlp"
model_options = { inputs = 64, width = 96, depth = 3 }
layers = ["hidden*"]
schedules = ["decay", "dynamic-rank"]
epochs = 4
batch_size = 61  # two processes have shares of 30 and 31
learning_rate = 0.01  # at more, rounding grows into other losses on some machines
decay_at = [2, 3]
inflate = 1.5
deflate = 3.2
rank = 0.5
"""
STEPS = 23  # of an epoch
SCHEDULES = "decay,dynamic-rank"
PATIENCE = 240.0  # seconds; the machine may be busy
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks"),
    pytest.mark.timeout(600),
]


def torchrun(*words: str) -> Started:
    """Start two processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return Started([*launcher, *place, "-m", "dynarank", *words], env=env)


FORKING = """
import os, sys, time
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from dynarank.cli import main
from dynarank.train.interruption import StopSignals

restarts, limit, folder, *words = sys.argv[1:]
asked = StopSignals.requested

def requested(stop):
    # After the first checkpoint it waits for a signal, or to be told to go on.
    if folder and Path(folder, "run", "checkpoints").exists():
        Path(folder, f"held-{os.environ['RANK']}-{os.getpid()}").touch()
        end = time.monotonic() + float(limit)
        while asked(stop) is None and not Path(folder, "go").exists():
            if time.monotonic() > end:
                raise TimeoutError("no signal came")
            time.sleep(0.01)
    return asked(stop)

StopSignals.requested = requested

def work(*words):
    sys.argv = ["dynarank", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise

config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                      max_restarts=int(restarts), start_method="fork")
elastic_launch(config, work)(*words)
"""


def forking(*words: str, held_in: Path | None = None, restarts: int = 0) -> Started:
    """Start two processes by torchrun's launcher, forked from one that has imported torch.

    With a folder, their run is its ``run``: it waits at its first checkpoint for what comes then.
    """
    return Started(["-c", FORKING, str(restarts), str(PATIENCE), str(held_in or ""), *words])


def said(started: Started) -> tuple[str, str]:
    try:
        return started.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        started.terminate()  # it ends its workers
        out, err = started.communicate()
        raise AssertionError(f"it has not ended: {out}{err}") from None


def wait_for(there: Callable[[], bool], started: Started) -> None:
    end = time.monotonic() + PATIENCE
    while not there():
        assert started.poll() is None, said(started)
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_until_held(folder: Path, started: Started) -> list[int]:
    """Wait for the first checkpoint; the process ids, by rank, of the workers that wait there."""
    wait_for(lambda: any(folder.glob("run/checkpoints/step-*")), started)
    wait_for(lambda: len([*folder.glob("held-*")]) == 2, started)
    return [int(path.name.rpartition("-")[2]) for path in sorted(folder.glob("held-*"))]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def together(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of two schedules in two processes: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("together") / "run"
    started = torchrun("train", recipe, "--schedule", SCHEDULES, "--out", str(folder), "--json")
    out, err = said(started)
    assert started.returncode == 0, err
    return folder, out, err


def losses(run: Run) -> list[float | None]:
    return [loss for e in run.all(EpochRecord) for loss in (e.train_loss, e.test_loss)]


def test_the_losses_are_those_of_one_process(
    together: tuple[Path, str, str], recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "train", recipe, "--schedule", SCHEDULES, "--out", str(tmp_path / "run"), "--quiet"
    assert call(monkeypatch, *words) == 0
    for name in SCHEDULES.split(","):
        one, two = (read_run(folder / name) for folder in (tmp_path / "run", together[0]))
        assert losses(two) == pytest.approx(losses(one), abs=1e-5)
        assert (one.header.processes, two.header.processes) == (1, 2)
        assert [p.forms for p in one.all(PhaseRecord)] == [p.forms for p in two.all(PhaseRecord)]


def test_one_process_speaks_and_writes(together: tuple[Path, str, str]) -> None:
    folder, out, err = together
    told = json.loads(out)  # once
    assert told["status"] == "finished" and err.count("decay: epoch 4/4") == 1
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "common.json", "decay", "dynamic-rank", "report.html"
    ]  # fmt: skip
    assert "2 processes on cpu" in (folder / "report.html").read_text(encoding="utf-8")


def test_all_reduced_bytes_are_told_by_phase(together: tuple[Path, str, str]) -> None:
    told = json.loads(together[1])["runs"]["dynamic-rank"]
    phases = told["phases"]
    assert len(phases) == 3 and phases[0]["end"] == phases[1]["epoch"]
    steps = [round((p["end"] - p["epoch"]) * STEPS) for p in phases]
    trained = [4 * p["trainable_parameters"] for p in phases]
    found = [p["all_reduced_bytes"] for p in phases]
    assert found == [size * n for size, n in zip(trained, steps, strict=True)]
    assert told["all_reduced_bytes"] == sum(found)


def test_a_killed_worker_is_started_again_from_the_checkpoint(
    together: tuple[Path, str, str], recipe: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = "train", recipe, "--schedule", "dynamic-rank", "--out", str(folder)
    started = forking(*words, held_in=tmp_path, restarts=1)
    os.kill(wait_until_held(tmp_path, started)[1], signal.SIGKILL)
    (tmp_path / "go").touch()
    _, err = said(started)
    assert started.returncode == 0, err
    assert "goes on from its checkpoint of step" in err
    assert "another process has ended" in err
    whole = read_run(together[0] / "dynamic-rank")
    assert losses(read_run(folder)) == losses(whole)  # bit for bit
    summaries = read_run(folder).summary, whole.summary
    assert len({one.model_sha256 for one in summaries if one}) == 1


def test_interrupted_it_goes_on_in_any_number_of_processes(
    together: tuple[Path, str, str],
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    words = "train", recipe, "--schedule", "dynamic-rank", "--out", str(folder)
    started = forking(*words, held_in=tmp_path)
    wait_until_held(tmp_path, started)
    started.send_signal(signal.SIGINT)  # torchrun passes it on
    _, err = said(started)
    step = re.search(r"interrupted \(SIGINT\): step (\d+) is done and saved", err)
    assert step is not None, err
    assert err.count("Stopping after this step") == 1
    assert f"torchrun --nproc-per-node 2 -m dynarank train --resume {folder}" in err
    assert call(monkeypatch, "train", "--resume", str(folder), "--quiet") == 0
    assert f"of step {step[1]} of 92, with 1 processes instead of 2" in capsys.readouterr().err
    whole = read_run(together[0] / "dynamic-rank")
    assert losses(read_run(folder)) == pytest.approx(losses(whole), abs=1e-5)
    assert [p.processes for p in read_run(folder).all(PhaseRecord)][-1] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train", "digit"), "digit"),
        (("train", "digits", "--batch-size", "1"), "a batch of 1 cannot be split among 2"),
        (("compare", "digits"), "compare works in one process, and 2 were started"),
    ],
)
def test_what_is_refused_is_said_once(words: tuple[str, ...], told: str) -> None:
    started = forking(*words)
    _, err = said(started)
    assert started.returncode != 0
    assert err.count("dynarank: error") == 1 and told in err, err
