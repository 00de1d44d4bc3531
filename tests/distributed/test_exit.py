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


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads codes of signals")
def test_a_process_ends_right_after_a_call(tmp_path: Path) -> None:
    for pair in range(PAIRS):
        command = [sys.executable, "-c", SCRIPT]
        started = [subprocess.Popen([*command, rank, tmp_path / f"store-{pair}"]) for rank in "01"]
        assert [one.wait(timeout=200) for one in started] == [0, 0]
