"""A killed worker: all are restarted, and go on from the newest verified checkpoint."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import restarted_run
import torch
from process_pool import Pools
from warm_python import run

HERE = Path(restarted_run.__file__).parent


def launch(folder: Path, *kills: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return run([restarted_run.__file__, str(folder), *kills], env=env)


# The forms change in steps 2 and 6 (of 0 to 11); after 1, 3, 5 and so on a checkpoint is written.
KILLS = [
    pytest.param(("2:0", "6:1", "10:0"), [2, 6, 10], id="after each change, before its checkpoint"),
    pytest.param(("write:9", "damage"), [2], id="while it is written, and the one before damaged"),
    pytest.param(("0:1", "4:0", "9:1"), [4, 8], id="in each phase", marks=pytest.mark.slow),
    pytest.param(
        tuple(f"write:{n}" for n in range(1, 40, 6)), [4] * 7, id="at every sixth call",
        marks=pytest.mark.slow,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kills", "resumed"), KILLS)
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    kills: tuple[str, ...], resumed: list[int], processes: Pools, tmp_path: Path
) -> None:
    whole = processes(2)(restarted_run.run, tmp_path / "whole")
    done = launch(tmp_path / "killed", *kills)
    assert done.returncode == 0, done.stderr[-3000:]
    for step in resumed:
        both = done.stdout.count(f"resumes after step {step}\n")
        assert both == 2 * resumed.count(step), done.stdout
    for rank, expected in enumerate(whole):
        found = torch.load(tmp_path / "killed" / f"final-{rank}.pt")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    if "damage" in kills:
        assert list((tmp_path / "killed" / "steps").glob("*.damaged"))
    assert not list((tmp_path / "killed" / "steps").glob(".*"))
