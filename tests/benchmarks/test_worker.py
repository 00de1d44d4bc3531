"""The workers: what is missing is run once, and what cannot be run stops nothing else."""

from __future__ import annotations

import math
import multiprocessing
import resource
import signal
import subprocess
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_experiment import FULL, Tiny, experiment, record, trial

from benchmarks.training.harness import arms, identity, worker
from benchmarks.training.harness.arm import Arm
from benchmarks.training.harness.narrow import flops
from benchmarks.training.harness.peers import own_bytes
from benchmarks.training.harness.store import Store
from benchmarks.training.harness.worker import Worker
from dynarank.forms import Rank

ONE_RATE = replace(FULL, rates=(1.0,))


def workers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, scratch: str = "scratch", **experiments: object
) -> Worker:
    monkeypatch.setattr(worker, "get", experiments.__getitem__)
    return Worker(list(experiments), folder, folder / scratch, folder / "results")


def left(one: Worker) -> Worker:
    """The worker, with its first run left after one step."""
    one.deadline = -math.inf
    (job, *_) = one._missing("tiny")
    assert not one._do(job)
    one.deadline = math.inf
    return one


def results(folder: Path) -> list:
    costs = (
        "cpu_seconds", "full_rank_seconds", "wall_seconds", "started", "load", "points",
    )  # fmt: skip
    return [{k: v for k, v in r.items() if k not in costs} for r in Store("tiny", folder).runs()]


def test_the_same_command_gives_the_same_records(tmp_path: Path, monkeypatch) -> None:
    for name in "ab":
        workers(tmp_path / name, monkeypatch, tiny=experiment(ONE_RATE)).work()
    one, other = (results(tmp_path / name / "results") for name in "ab")
    assert one == other and len(one) == 3


@pytest.mark.parametrize(
    "change", ["rate", "steps", "decay", "data", "penalty", "narrow", "code", "method", "results"]
)
def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path, monkeypatch, change: str) -> None:
    left(workers(tmp_path, monkeypatch, tiny=experiment(ONE_RATE)))
    arm, place = ONE_RATE, tmp_path
    if change == "rate":
        monkeypatch.setattr(Tiny, "rate", 0.02)
    elif change == "steps":
        monkeypatch.setattr(Tiny, "steps", property(lambda _: 20, lambda *_: None), raising=False)
    elif change == "decay":
        monkeypatch.setattr(Tiny, "weight_decay", 0.3)
    elif change == "data":
        drawn = Tiny().parts["train"][0]
        monkeypatch.setattr(torch, "randn", lambda *_, **__: 2 * drawn)
    elif change == "penalty":
        arm = replace(arm, penalty="soft")
    elif change == "narrow":
        arm = replace(arm, narrow=0.5)
    elif change == "method":
        monkeypatch.setattr(Tiny, "factor", lambda *_: 0.5)
    elif change == "code":
        monkeypatch.setattr("benchmarks.training.harness.identity.code", lambda: "other")
    begun = []
    monkeypatch.setattr(worker.Trial, "_load", lambda *_: begun.append("a checkpoint"))
    one = workers(place, monkeypatch, tiny=experiment(arm))
    if change == "results":
        one = Worker(["tiny"], place, place / "scratch", place / "other results")
    one._next()
    assert begun == [] and len(Store("tiny", one.results).runs()) == 1


def test_a_checkpoint_of_the_run_is_used_and_removed(tmp_path: Path, monkeypatch) -> None:
    one = left(workers(tmp_path, monkeypatch, tiny=experiment(ONE_RATE)))
    begun, load = [], worker.Trial._load
    monkeypatch.setattr(
        worker.Trial, "_load", lambda self, path: (begun.append(path), load(self, path))
    )
    one._next()
    assert len(begun) == 1 and not begun[0].exists()


@pytest.mark.parametrize("file", ["model", "extra", "all"])
def test_a_damaged_checkpoint_is_not_used(tmp_path: Path, monkeypatch, capfd, file: str) -> None:
    one = left(workers(tmp_path, monkeypatch, tiny=experiment(ONE_RATE)))
    (folder,) = (path for path in one.scratch.iterdir() if path.is_dir())
    damaged = [p for p in folder.rglob("*") if p.is_file() and (file in p.name or file == "all")]
    for path in damaged or [p for p in folder.rglob("*") if p.is_file()]:
        path.write_bytes(path.read_bytes()[:-7])
    assert one.work() == 3
    assert "full rank, seed 100 begins again" in capfd.readouterr().err
    workers(tmp_path / "whole", monkeypatch, tiny=experiment(ONE_RATE)).work()
    assert results(one.results) == results(tmp_path / "whole" / "results")


def test_a_run_that_raises_leaves_the_other_arms(tmp_path: Path, monkeypatch, capfd) -> None:
    def broken(*_: object) -> torch.nn.Module:
        raise RuntimeError("shapes differ")

    bad = Arm("bad", None, (1.0,), prepare=broken)
    one = workers(tmp_path, monkeypatch, tiny=experiment(bad, ONE_RATE))
    assert one.work() == 4  # the one that raised is done with too
    assert Counter(r["arm"] for r in Store("tiny", one.results).runs()) == {"full rank": 3}
    assert one.left_out == {("tiny", "bad")}
    assert "tiny: bad is left out: shapes differ" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["problem", "records", "held out"])
def test_a_bad_experiment_leaves_the_others(tmp_path: Path, monkeypatch, capfd, what: str) -> None:
    class Empty(Tiny):
        def held_out(self, part: str) -> object:  # pyright: ignore
            return iter(())

    bad = experiment(ONE_RATE)
    if what == "problem":
        bad = replace(bad, metric="loss", higher=False)
    elif what == "held out":
        bad = replace(bad, problem=lambda _: Empty())
    else:
        (tmp_path / "results").mkdir()
        (tmp_path / "results/bad.jsonl").write_text("{}\n")
    one = workers(tmp_path, monkeypatch, bad=bad, tiny=experiment(ONE_RATE))
    assert one.work() == 3 and one.left_out == {("bad",)}
    assert "bad is left out: " in capfd.readouterr().err


def test_an_arm_that_waits_for_one_that_failed_is_named(tmp_path: Path, monkeypatch, capfd) -> None:
    def broken(*_: object) -> torch.nn.Module:
        raise RuntimeError("shapes differ")

    lead = Arm("lead", None, (1.0,), family="a", prepare=broken)
    tiny = experiment(lead, Arm("led", None, (1.0,), family="a"))
    one = workers(tmp_path, monkeypatch, tiny=tiny)
    one.work()
    assert one.left_out == {("tiny", "lead"), ("tiny", "led")}
    assert "led is left out: it waits for 'lead', which is left out" in capfd.readouterr().err


def test_an_arm_that_is_never_run_is_named(tmp_path: Path, monkeypatch, capfd) -> None:
    class Lost(Tiny):
        def held_out(self, part: str) -> object:  # pyright: ignore
            return ((x * math.nan, y) for x, y in super().held_out(part))

    lost = replace(FULL, name="nan", rates=(1.0,))
    tiny = experiment(ONE_RATE, lost, *arms.matched([lost]))
    one = workers(tmp_path, monkeypatch, tiny=replace(tiny, problem=Lost))
    assert one.work() == 6 and one.left_out == set()
    told = "tiny: fixed as nan is never run: 'nan' diverged on all seeds\n"
    assert capfd.readouterr().err == told


@pytest.mark.parametrize("options", [{"length": 0.01}, {"length": -1.0}])
def test_an_arm_of_no_step_is_left_out(tmp_path: Path, monkeypatch, capfd, options: dict) -> None:
    short = Arm("short", None, (1.0,), **options)
    one = workers(tmp_path, monkeypatch, tiny=experiment(ONE_RATE, short))
    one.work()
    assert Counter(r["arm"] for r in Store("tiny", one.results).runs()) == {"full rank": 3}
    words = f"short is left out: {short.length:g} of 40 steps is no step"
    assert one.left_out == {("tiny", "short")} and words in capfd.readouterr().err


def test_a_disk_that_is_full_ends_the_worker(tmp_path: Path, monkeypatch) -> None:
    one = workers(tmp_path, monkeypatch, tiny=experiment(ONE_RATE))
    monkeypatch.setattr(Store, "append", _no_space)
    with pytest.raises(OSError, match="no space"):
        one.work()


def _no_space(*_: object) -> None:
    raise OSError(28, "no space")


def test_an_arm_that_waits_for_one_that_was_not_asked_for_is_named(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    ranks = [replace(one, rates=(1.0,)) for one in arms.fixed_ranks(shares=(1 / 4, 1 / 2))]
    like = arms.matched([replace(FULL, name="costly")])[0]
    tiny = experiment(*ranks, replace(FULL, name="costly", rates=(1.0,)), like)
    one = workers(tmp_path, monkeypatch, tiny=tiny)
    one.arms = ["fixed 1/2", "fixed as*"]
    assert one.work() == 0
    told = capfd.readouterr().err
    assert "tiny: fixed 1/2 is left out: it waits for 'fixed 1/4'; name that" in told
    assert "tiny: fixed as costly is left out: it waits for 'fixed 1/4'" in told
    one.arms, one.left_out = ["fixed 1/4"], set()
    assert one.work() > 0 and one.left_out == set()
    one.arms = ["fixed 1/2", "fixed as*"]
    assert one.work() == 2
    assert one.left_out == {("tiny", "fixed as costly")}
    assert "it waits for 'costly'" in capfd.readouterr().err


def test_a_run_that_cannot_be_saved_says_so_when_it_is_left(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    other = Arm("other", None, (1.0,), optimizer=lambda p, m, r: _Projecting(m.parameters(), lr=r))
    left(workers(tmp_path, monkeypatch, tiny=experiment(other)))
    left(workers(tmp_path, monkeypatch, tiny=experiment(ONE_RATE)))
    told = capfd.readouterr().err.splitlines()
    assert told[0].endswith("its optimizer is not saved; give it more time")
    assert told[1] == "tiny: full rank, seed 100 is left at step 1 of 40 and goes on from there"


def test_two_commands_with_other_scratch_record_a_run_once(tmp_path: Path, monkeypatch) -> None:
    tiny = experiment(ONE_RATE)
    one = workers(tmp_path, monkeypatch, tiny=tiny)
    (job, *_) = one._missing("tiny")
    assert workers(tmp_path, monkeypatch, "another", tiny=tiny)._next()
    one._do(job)
    assert len(Store("tiny", one.results).runs()) == 1


def test_a_worker_waits_while_others_do_all_that_is_left(tmp_path: Path, monkeypatch) -> None:
    one = workers(tmp_path, monkeypatch, tiny=experiment(ONE_RATE))
    with ExitStack() as others:
        for job in one._missing("tiny"):
            assert others.enter_context(one._claimed(job))
        assert one._next() is None
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            others.close()

        monkeypatch.setattr(worker.time, "sleep", sleep)
        assert one.work() == 3 and len(waits) == 1
    assert one._next() is False


def test_what_cannot_be_run_is_left_out_by_name(tmp_path: Path, monkeypatch, capfd) -> None:
    def none(_: Path) -> Tiny:
        raise FileNotFoundError("there is no such text")

    def no_package(*_: object) -> torch.optim.Optimizer:
        raise ImportError("the arm needs the package a")

    needy = Arm("needy", None, (1.0,), optimizer=no_package)
    without = replace(experiment(ONE_RATE), problem=none)
    one = workers(tmp_path, monkeypatch, books=without, tiny=experiment(needy, ONE_RATE))
    one.work()
    assert Counter(r["arm"] for r in Store("tiny", one.results).runs()) == {"full rank": 3}
    assert one.left_out == {("books",), ("tiny", "needy")}
    told = capfd.readouterr().err
    assert "books is left out: there is no such text" in told
    assert "tiny: needy is left out: the arm needs the package a" in told


def test_results_that_cannot_be_written_are_an_error_before_the_first_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Worker([], tmp_path, tmp_path / "scratch", tmp_path / "file")


def _append_too_much(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(OSError, match="could not be written"):
        Store("a", folder).append(record(seed=1, text="x" * 2000))
    Store("a", folder).append(record(seed=2))


def test_a_record_for_which_there_is_no_space_is_an_error(tmp_path: Path) -> None:
    Store("a", tmp_path).append(record())
    process = multiprocessing.get_context("fork").Process(target=_append_too_much, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [r["seed"] for r in Store("a", tmp_path).runs()] == [0, 2]


class _Projector:
    def __init__(self, rows: int) -> None:
        self.matrix, self.rank = torch.zeros(rows, 4), 4


class _Projecting(torch.optim.AdamW):
    """An optimizer that keeps a matrix in an object, as GaLore does."""

    def step(self, closure: object = None) -> None:  # pyright: ignore
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("projector", _Projector(p.shape[0]))


def test_optimizers_of_other_projects_are_measured_whole_and_not_saved(tmp_path: Path) -> None:
    arm = Arm("other", None, optimizer=lambda p, m, r: _Projecting(m.parameters(), lr=r))
    one, plain = trial(arm), trial(FULL)
    one.step()
    plain.step()
    rows = sum(p.shape[0] for p in one.model.parameters())
    assert own_bytes(one.optimizer) == 16 * rows and own_bytes(plain.optimizer) == 0
    assert one.seen["memory"] == plain.seen["memory"] + 16 * rows
    one._save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_related_methods_are_run_as_their_schedules_say() -> None:
    for arm in arms.related(Rank(1 / 4), every=7):
        assert arm.rewarmup == (getattr(arm.schedule, "rewarmup", None) or arm.rewarmup)
        assert arm.moments == (getattr(arm.schedule, "moments", None) or arm.moments)


def test_the_flops_of_the_full_network_draw_nothing() -> None:
    torch.manual_seed(5)
    flops(Tiny())
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert drawn == torch.rand(())


def test_a_network_that_ends_not_finite_has_no_result(tmp_path: Path) -> None:
    one = trial(FULL)
    one.run(tmp_path / "none")
    with torch.no_grad():
        one.model[4].bias.fill_(math.nan)  # pyright: ignore
    assert one.result("test")["result"] == {}


def test_records_and_docs_do_not_make_the_code_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        own = ("-c", "user.name=a", "-c", "user.email=a@a")
        subprocess.run(["git", *own, *arguments], cwd=tmp_path, check=True, capture_output=True)

    files = ["benchmarks/training/results/a.jsonl", "docs/a.md", "README.md", "src/a.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    monkeypatch.setattr(identity, "_TRAINING", tmp_path / "benchmarks" / "training")
    clean = identity.commit()
    for name in files[:3]:
        (tmp_path / name).write_text("2")
    assert identity.commit() == clean
    (tmp_path / "src/a.py").write_text("2")
    assert identity.commit() == f"{clean}, changed"
