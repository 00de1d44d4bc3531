"""Commands lose nothing: interrupted, killed, repeated, twice at once, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import re
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
from faults import FULL, some
from warm_python import Started

import dynarank
from dynarank.cli.interruption import GoOn
from dynarank.cli.show import console
from dynarank.files.atomic import replacing
from dynarank.files.ownership import owned
from dynarank.records import SummaryRecord, read_run
from dynarank.train.interruption import Interrupted

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


# In its 24th epoch a run of 25 waits for a signal, so that it does not end before one has come.
WAITING = """
import time
from pathlib import Path
from dynarank.cli import main
from dynarank.train.interruption import StopSignals

asked = StopSignals.requested

def requested(stop):
    while asked(stop) is None and Path("one/records.jsonl").read_text().count('"epoch",') > 22:
        time.sleep(0.01)
    return asked(stop)

StopSignals.requested = requested
main()
"""


@contextmanager
def started(
    *words: str, cwd: Path, python: tuple[str, str] = ("-m", "dynarank")
) -> Iterator[Started]:
    """A command in a process of its own, which is killed at the end."""
    process = Started([*python, *words], cwd=cwd)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(ready: Callable[[], object], process: Started) -> None:
    deadline = time.monotonic() + 180
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


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
    assert (
        code == 0 and "Finished already" in out and "dynamic-rank" in out and "epoch 1/" not in out
    )
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
    assert run(*ONE, "--out", "one")[0] == 0
    before = contents(here / "one")
    for words, told in OTHER.values():
        code, _, err = run(*ONE, *words, how, "one")
        assert code == 2 and re.search(told, err) and "--out" in err, err
        assert contents(here / "one") == before


def test_runs_that_this_command_did_not_make_are_refused(run: Any, here: Path) -> None:
    (here / "all").mkdir()
    (here / "all" / "notes.txt").write_text("mine")  # other files do no harm
    assert run(*ONE, "--out", "all/one")[0] == 0
    code, _, err = run(*ONE, "--out", "all")
    assert code == 2 and "already holds a run: all/one" in err
    code, _, err = run("compare", "digits", *SMALL, "--out", "all/one")
    assert code == 2 and "command: train there, compare now" in err
    (here / "hub").mkdir()
    (here / "hub" / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = run(*ONE, "--out", "hub")
    assert code == 2 and "hub holds files that are not of a run (config.json)" in err
    (here / "hub" / "config.json").rename(here / "hub" / "notes.json")
    assert run(*ONE, "--out", "hub")[0] == 0


def test_what_resume_takes(run: Any, here: Path) -> None:
    two = [*ONE[:-1], "full-rank,low-rank", "--rank", "4", "--out", "two"]
    assert run(*two)[0] == 0
    code, out, _ = run("train", "--resume", "two/low-rank")  # a part of it
    assert code == 0 and "Finished already" in out and "full-rank" in out
    assert run("train", "digits", "--rank", "4", "--resume", "two")[0] == 0
    (here / "link").symlink_to("two/low-rank")
    assert run("train", "--resume", "link")[0] == 0
    assert run("train", "text-gpt", "--resume", "two")[2].count("is of digits, not of text-gpt")
    assert "either --out or --resume" in run("train", "--resume", "two", "--out", "x")[2]
    assert "no common.json" in run("train", "--resume", "nowhere")[2]
    assert "name a recipe" in run("train")[2]
    (here / "two" / "common.json").write_text('{"command": "compare"}')
    assert "the same `dynarank compare` command goes on" in run("train", "--resume", "two")[2]
    (here / "two" / "common.json").write_text('{"command": "train", "seed": ')
    code, _, err = run("train", "--resume", "two")
    assert code == 2 and "two/common.json cannot be read" in err
    assert run(*two)[0] == 0  # each run still says what it is


# Interrupted.


@contextmanager
def signal_at(step: int, signum: int) -> Iterator[None]:
    """A signal comes when a step of a run is shown."""
    from dynarank.cli.progress import ProgressListener

    shown = ProgressListener.step

    def stepped(listener: ProgressListener, progress: Any) -> None:
        shown(listener, progress)
        if progress.step == step:
            signal.raise_signal(signum)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressListener, "step", stepped)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "one"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, *ONE, "--out", str(folder)) == 0
    return folder


def assert_same_run(one: Path, two: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert without_times(read_run(one).summary) == without_times(read_run(two).summary)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("again", ["same", "resume"])
def test_an_interrupted_run_is_saved_and_goes_on(
    signum: int, code: int, again: str, run: Any, whole: Path, here: Path
) -> None:
    with signal_at(4, signum):
        stopped, _, err = run(*ONE, "--out", "one")
    assert stopped == code
    assert "step 4 is done and saved in one" in err and "Traceback" not in err
    assert "go on:    dynarank train --resume one" in err
    assert "the page: dynarank report one" in err
    assert all(len(line) <= 80 for line in err.splitlines())
    assert run("report", "one")[0] == 0
    words = [*ONE, "--out", "one"] if again == "same" else ["train", "--resume", "one"]
    assert run(*words)[0] == 0
    assert_same_run(here / "one", whole)


def test_an_interrupted_run_is_found_by_the_same_command_without_a_folder(
    run: Any, whole: Path, here: Path
) -> None:
    with signal_at(4, signal.SIGTERM):
        code, out, _ = run(*ONE, "--json")
    told = json.loads(out)
    assert code == 143 and told["status"] == "interrupted" and told["step"] == 4
    assert told["go_on"] == f"dynarank train --resume {told['folder']}"
    other = json.loads(run(*ONE, "--seed", "1", "--json")[1])
    same = json.loads(run(*ONE, "--json")[1])
    third = json.loads(run(*ONE, "--json")[1])
    assert same["folder"] == told["folder"]
    assert len({told["folder"], other["folder"], third["folder"]}) == 3
    assert_same_run(here / same["folder"], whole)


def test_of_several_schedules_each_goes_on_where_it_was(run: Any, whole: Path, here: Path) -> None:
    words = [*ONE[:-1], "full-rank,dynamic-rank", "--out", "two"]
    with signal_at(4, signal.SIGTERM):
        assert run(*words)[0] == 143
    assert not (here / "two" / "dynamic-rank").exists()
    with signal_at(5, signal.SIGTERM):
        assert run(*words)[0] == 143
    with signal_at(2, signal.SIGTERM):
        code, _, err = run(*words)
    assert code == 143 and "step 2 is done and saved in two/dynamic-rank" in err
    kept = contents(here / "two" / "full-rank")
    assert run(*words)[0] == 0
    assert contents(here / "two" / "full-rank") == kept
    assert_same_run(here / "two" / "dynamic-rank", whole)


def test_an_interrupted_comparison_keeps_what_is_finished(
    run: Any, whole: Path, here: Path
) -> None:
    words = ["compare", "digits", *SMALL, "--schedules", "full-rank,dynamic-rank", "--seeds", "1",
             "--out", "all"]  # fmt: skip
    with signal_at(6, signal.SIGINT):  # the last step of the first run
        assert run(*words)[0] == 130
    with signal_at(2, signal.SIGINT):
        code, _, err = run(*words)
    assert code == 130 and f"go on:    {shlex.join(['dynarank', *words])}" in err
    kept = contents(here / "all" / "seed0" / "full-rank")
    code, out, _ = run(*words, "--json")
    assert code == 0 and json.loads(out)["finished_before"] == ["all/seed0/full-rank"]
    assert contents(here / "all" / "seed0" / "full-rank") == kept
    assert_same_run(here / "all" / "seed0" / "dynamic-rank", whole)


@pytest.mark.parametrize("name", ["make_task", "check_schedules", "write_report"])
def test_a_signal_outside_of_training_loses_nothing(
    name: str, run: Any, whole: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(f"dynarank.cli.job_runner.{name}", interrupted)
        code, _, err = run(*ONE, "--out", "one")
    assert code == 143 and "interrupted (SIGTERM)" in err and "Traceback" not in err
    assert (here / "one").exists() == (name == "write_report")
    assert ("--resume one" in err) == (name == "write_report")  # a run that is not there
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are given back
    assert run(*ONE, "--out", "one")[0] == 0
    assert_same_run(here / "one", whole)


@pytest.mark.parametrize("signum", some([signal.SIGKILL], [signal.SIGINT, signal.SIGTERM]))
def test_a_process_that_is_stopped_goes_on(signum: int, run: Any, here: Path) -> None:
    words = ["train", "digits", "--epochs", "25", *SMALL[2:], "--schedule", "low-rank", "--out",
             "one", "--checkpoint-every", "0"]  # fmt: skip
    records = here / "one" / "records.jsonl"
    with started(*words, cwd=here, python=("-c", WAITING)) as process:
        wait_for(lambda: records.exists() and records.read_text().count('"epoch",') > 2, process)
        process.send_signal(signum)
        _, err = process.communicate()
    assert process.returncode == (128 + signum if signum != signal.SIGKILL else -signum), err
    assert "Traceback" not in err and read_run(here / "one").summary is None
    before = records.read_text().splitlines()[0]
    assert run(*words)[0] == 0
    assert records.read_text().splitlines()[0] == before  # the same run, gone on with
    assert read_run(here / "one").summary is not None


# Two at once.


def test_two_commands_in_the_same_second_get_a_folder_each(
    run: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("dynarank.cli.train.datetime", Fixed)
    found = [json.loads(run(*ONE, "--json")[1])["folder"] for _ in range(2)]
    assert found == ["runs/digits-20260102-030405", "runs/digits-20260102-030405-2"]


def test_a_second_command_in_one_folder_is_refused(run: Any, whole: Path, here: Path) -> None:
    from dynarank.cli.progress import ProgressListener

    shown, said = ProgressListener.step, list[tuple[int, str]]()

    def stepped(listener: ProgressListener, progress: Any) -> None:
        shown(listener, progress)
        if progress.step == 3:
            for words in ([*ONE, "--out", "one"], ["train", "--resume", "one"]):
                with started(*words, cwd=here) as second:
                    _, err = second.communicate(timeout=120)
                said.append((second.returncode, err))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressListener, "step", stepped)
        assert run(*ONE, "--out", "one")[0] == 0
    assert [code for code, _ in said] == [2, 2]
    assert all(f"{os.getpid()}" in err and "Traceback" not in err for _, err in said)
    assert_same_run(here / "one", whole)


def test_a_live_run_can_be_reported(run: Any, here: Path, whole: Path) -> None:
    with owned(whole):
        assert run("report", str(whole), "--out", "page.html")[0] == 0


# A full disk.


@pytest.mark.parametrize(
    ("place", "number"),
    some(
        [("report.page", errno.ENOSPC), ("report.plotting", errno.EDQUOT)],
        [("report.page", errno.EIO)],
    ),
)
def test_a_report_that_does_not_fit_on_the_disk_loses_nothing(
    place: str,
    number: int,
    run: Any,
    here: Path,
    real_page: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = ["sweep", "digits", *SMALL, "--inflate", "10", "--deflate", "20", "--out", "all"]
    words, name = (
        (sweep, "replacing") if "plotting" in place else ([*ONE, "--out", "all"], "write_text")
    )

    def full(path: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(f"dynarank.{place}.{name}", full)
        code, out, err = run(*words)
    assert code == 1 and os.strerror(number) in err and len(err.splitlines()) == 1
    assert "the same command goes on" in err and "digits" in out  # the results are shown
    code, out, _ = run(*words)
    assert code == 0 and "Finished already" in out
    assert list((here / "all").glob("*.html" if name == "write_text" else "*.png"))


@pytest.mark.skipif(not FULL, reason="takes long: DYNARANK_FAULTS=full")
def test_a_run_whose_weights_do_not_fit_on_the_disk_is_finished_by_the_same_command(
    run: Any, whole: Path, here: Path
) -> None:
    """No file may be larger than 64 KB: neither a checkpoint nor the weights."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16));"
        f"sys.argv = {['dynarank', *ONE, '--out', 'one']}; from dynarank.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(dynarank.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr and "the same command goes on" in done.stderr
    assert not (here / "one" / "model.safetensors").exists()
    assert run(*ONE, "--out", "one")[0] == 0
    assert_same_run(here / "one", whole)


def test_an_interruption_on_a_full_disk_does_not_claim_to_have_saved(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dynarank.checkpoint.steps.write_together", full)
    with signal_at(3, signal.SIGTERM):
        code, _, err = run(*ONE, "--out", "one")
    assert code == 143 and "is done and saved" not in err
    assert "interrupted (SIGTERM): no step of one could be saved, it will begin again" in err


def test_an_output_that_nobody_reads_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of ``dynarank train digits | head -1``, or after the terminal was closed."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        for _ in range(2):
            console().print("low-rank: epoch 1/2")
            closed.flush()

    def gone(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(SystemExit, match="129"):
        GoOn(Path("one"), ("dynarank",), False).leave(Interrupted(signal.SIGHUP))


def test_an_old_page_stays_whole_when_the_new_one_does_not_fit(here: Path) -> None:
    (here / "page.html").write_text("old")
    with pytest.raises(OSError, match="full"), replacing(here / "page.html") as beside:
        beside.write_text("new, in part")
        raise OSError("full")
    assert [path.read_text() for path in here.iterdir()] == ["old"]
