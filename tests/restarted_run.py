"""A run of two processes that is killed at given places, once each, and restarted as by torchrun.

``python restarted_run.py FOLDER KILL ...``: each KILL is ``STEP:RANK`` (after that step, before its
checkpoint), ``write:N`` (at the N-th call of the writer in process 0; several in turn) or
``damage`` (the newest checkpoint changes before it is read). It is torchrun's launcher, but its
processes fork from one that has imported torch, which takes longer than the run.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what an optimizer imports: once here, before the processes fork
import torch.distributed as dist
from faults import at_calls, killing
from only_new_objects import search_only_new_objects
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

import dynarank as dr
from dynarank.checkpoint.snapshot import restore, take
from dynarank.checkpoint.steps import Checkpoints
from dynarank.distributed.joining import init_process_group

STEPS, EVERY = 12, 2  # the form changes after steps 2 and 6


def once(folder: Path, name: str) -> bool:
    """Whether this process is the first to come here with the name."""
    try:
        (folder / f"{name}.done").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def run(folder: Path, kills: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Train to the end, from the newest checkpoint; the final weights."""
    rank, places = dist.get_rank(), [kill for kill in kills if kill[0].isdigit()]
    folder.mkdir(exist_ok=True)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 12))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), 1e-2)
    schedule = dr.schedules.dynamic_rank(
        rank=2, inflate=3 / STEPS, deflate=7 / STEPS, to="low-rank"
    )
    ranks = dr.RankScheduler(ddp, optimizer, schedule, total_steps=STEPS)
    kept: dict[str, Any] = {"model": ddp, "optimizer": optimizer, "ranks": ranks}
    damage(folder, kills)
    checkpoints = Checkpoints(folder / "steps")
    found = checkpoints.newest()
    if found is not None:
        restore(found[1], **kept)
        # print() writes a line's end by itself: that of another process may come between.
        os.write(1, f"process {rank} resumes after step {found[0]}\n".encode())
    for step in range(found[0] if found else 0, STEPS):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        ddp(x.chunk(2)[rank]).square().mean().backward()
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
        if f"{step}:{rank}" in places and once(folder, f"{step}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step % EVERY == EVERY - 1:
            with at_calls(killing_writer(folder, kills)) if step == 5 else nullcontext():
                checkpoints.save(step + 1, take(**kept), wait=True)
    checkpoints.close()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def killing_writer(folder: Path, kills: tuple[str, ...]) -> Any:
    at = [kill for kill in kills if kill.startswith("write:") and dist.get_rank() == 0]
    chosen = next((kill for kill in at if once(folder, kill)), "write:-1")
    return killing(int(chosen.removeprefix("write:")))


def damage(folder: Path, kills: tuple[str, ...]) -> None:
    """Change a bit of the newest checkpoint."""
    steps = sorted((folder / "steps").glob("step-*"))
    if "damage" in kills and dist.get_rank() == 0 and steps and once(folder, "damage"):
        path = steps[-1] / "optimizer.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    dist.barrier()


def work(folder: Path, kills: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    search_only_new_objects()
    init_process_group("gloo")
    final = run(folder, kills)
    torch.save(final, folder / f"final-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def launch(folder: Path, kills: tuple[str, ...]) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=len(kills),
        start_method="fork",
    )
    elastic_launch(config, work)(folder, kills)


if __name__ == "__main__":
    launch(Path(sys.argv[1]), tuple(sys.argv[2:]))
