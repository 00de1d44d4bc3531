"""A process may end right after a collective call: gloo's threads are not its last owners then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PAIRS = 5  # without the remedy about two in five abort

SCRIPT = """
import sys
import torch.distributed as dist
from dynarank.distributed.processes import processes_of
rank, store = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
for step in range(3):
    processes_of().from_first("the step", {"step": step})
"""
DESTROYED = """
import weakref
world = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
assert world() is None
"""


def codes_of_a_pair(script: str, store: Path) -> list[int]:
    command = [sys.executable, "-c", script]
    started = [subprocess.Popen([*command, rank, store]) for rank in "01"]
    return [one.wait(timeout=200) for one in started]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads codes of signals")
def test_a_process_ends_right_after_a_call(tmp_path: Path) -> None:
    for pair in range(PAIRS):
        assert codes_of_a_pair(SCRIPT, tmp_path / f"store-{pair}") == [0, 0]


def test_a_destroyed_group_is_kept_by_nobody(tmp_path: Path) -> None:
    """Its threads end with it, whatever call a script's last one was; kept, they outlive Python."""
    assert codes_of_a_pair(SCRIPT + DESTROYED, tmp_path / "store") == [0, 0]
