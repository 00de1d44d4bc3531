"""A writer killed at random and at every call of the system: what it acknowledged is there."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import (
    at_calls,
    contents,
    count_calls,
    equal,
    in_child,
    killing,
    litter,
    trials,
    wait_for,
)

from dynarank.checkpoint.folder import Contents, read_folder, write_folder
from dynarank.checkpoint.steps import Checkpoints

STEPS = 4


def train(folder: Path, steps: int, background: bool, say: int = -1) -> torch.Tensor:
    """A run that goes on from its newest checkpoint and saves each step."""
    checkpoints = Checkpoints(folder, background=background)
    found = checkpoints.newest()
    begin, weight = (found[0], found[1].tensors["m"]["w"]) if found else (0, torch.ones(4096))
    for step in range(begin + 1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        weight = weight * 0.9 + torch.randn(4096, generator=generator)
        checkpoints.save(step, Contents({"m": {"w": weight.clone()}}, {"state": {"step": step}}))
        if say >= 0 and (known := checkpoints.last_acknowledged) is not None:
            os.write(say, bytes([known]))
    checkpoints.close()
    return weight


def check_resumes(folder: Path, said: bytes, steps: int, final: torch.Tensor) -> None:
    checkpoints = Checkpoints(folder)
    assert litter(folder) == []
    found = checkpoints.newest()
    assert (found[0] if found else 0) >= max(said, default=0)
    assert not list(folder.glob("*.damaged"))
    assert torch.equal(train(folder, steps, False), final)


@pytest.mark.slow
def test_killed_at_every_call(tmp_path: Path) -> None:
    calls = count_calls(lambda: train(tmp_path / "whole", STEPS, False))
    final = train(tmp_path / "whole", STEPS, False)
    assert {"open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= set(calls)
    for at in range(1, len(calls) + 1):
        folder = tmp_path / str(at)

        def run(say: int, at: int = at, folder: Path = folder) -> None:
            with at_calls(killing(at)):
                train(folder, STEPS, False, say)

        status, said = wait_for(*in_child(run))
        assert status in (-signal.SIGKILL, 0), at  # its acknowledgments count as calls too
        check_resumes(folder, said, STEPS, final)


def seconds_in_a_child(folder: Path, steps: int) -> float:
    begin = time.perf_counter()
    assert wait_for(*in_child(partial(train, folder, steps, True)))[0] == 0
    return time.perf_counter() - begin


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """After so many acknowledgments and a part of a step: a slow machine only takes longer."""
    steps = 12
    final = train(tmp_path / "whole", steps, True)
    step = min(seconds_in_a_child(tmp_path / f"whole-{n}", steps) for n in range(3)) / steps
    draw, killed = random.Random(0), 0
    count = trials(25, 200)
    for trial in range(count):
        folder = tmp_path / str(trial)
        pid, reading = in_child(partial(train, folder, steps, True))
        before = b"".join(os.read(reading, 1) for _ in range(draw.randrange(steps)))
        time.sleep(draw.uniform(0, 1.2 * step))
        os.kill(pid, signal.SIGKILL)
        status, after = wait_for(pid, reading)
        killed += status == -signal.SIGKILL
        check_resumes(folder, before + after, steps, final)
    assert killed > count // 3


def test_killed_while_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    def replace(folder: Path) -> None:
        write_folder(folder, contents(2))

    def fresh(name: str) -> Path:
        write_folder(tmp_path / name / "checkpoint", contents(1))
        return tmp_path / name / "checkpoint"

    seen = set[int]()
    whole = fresh("whole")
    for at in range(1, len(count_calls(lambda: replace(whole))) + 1):
        folder = fresh(str(at))

        def run(_: int, at: int = at, folder: Path = folder) -> None:
            with at_calls(killing(at)):
                replace(folder)

        assert wait_for(*in_child(run))[0] == -signal.SIGKILL
        found = read_folder(folder)
        assert equal(found, contents(found.data["state"]["step"]))
        seen.add(found.data["state"]["step"])
        replace(folder)
        assert litter(folder.parent) == []
        assert equal(read_folder(folder), contents(2))
    assert seen == {1, 2}


@pytest.mark.parametrize("ending", ["return", "exit", "exception"])
def test_a_save_in_the_background_is_finished_at_exit(tmp_path: Path, ending: str) -> None:
    import subprocess
    import sys

    code = f"""
import sys, time
from pathlib import Path
import dynarank.checkpoint.steps as steps
from dynarank.checkpoint.folder import Contents
write = steps.write_together
steps.write_together = lambda *a, **k: (time.sleep(0.5), write(*a, **k))
steps.Checkpoints(Path({str(tmp_path)!r})).save(7, Contents(data={{"state": 7}}))
{dict(exit="sys.exit(3)", exception="raise KeyError", **{"return": ""})[ending]}
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True)
    found = Checkpoints(tmp_path).newest()
    assert found is not None and found[0] == 7
