"""A loop of your own in several processes: DDP, changes of rank, checkpoints, restarts.

    torchrun --nproc-per-node 2 --max-restarts 1 examples/11_several_processes.py --kill-at 120

Each process trains on its part of every batch. At step 120 one is killed; torchrun starts all
again, and they go on from the last checkpoint. Needs scikit-learn (``pip install
'dynarank[demo]'``); runs in some seconds on two CPU cores. On GPUs, each process has a device.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dynarank as dr
from dynarank.distributed import init_process_group

BATCH, EVERY = 64, 50


def network() -> nn.Sequential:
    """A plain network: DDP and the rank scheduler do the rest."""
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def kill_once(folder: Path) -> None:
    """What a failing machine does to a process; only in the first attempt."""
    if not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main(steps: int, folder: Path, kill_at: int | None) -> None:
    """Train in as many processes as torchrun has started."""
    init_process_group("gloo")  # torch's, but safe in a process that was restarted
    rank, size = dist.get_rank(), dist.get_world_size()
    folder.mkdir(parents=True, exist_ok=True)

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    x = (x - x.mean()) / x.std()

    torch.manual_seed(rank)  # DDP gives all the weights of the first; dropout is each one's
    model = DistributedDataParallel(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule = dr.schedules.dynamic_rank(rank=0.25, inflate=0.3, deflate=0.7)
    ranks = dr.RankScheduler(model, optimizer, schedule, total_steps=steps)

    run: dict[str, Any] = {"model": model, "optimizer": optimizer}
    run |= {"lr_scheduler": lr_scheduler, "ranks": ranks}
    start = 0
    if (folder / "last").exists():
        start = dr.load(folder / "last", **run)["step"]
        print(f"process {rank} of {size} goes on at step {start}", flush=True)

    loss = torch.zeros(())
    for step in range(start, steps):
        batch = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        mine = batch[rank::size]
        loss = F.cross_entropy(model(x[mine]), y[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        ranks.step()  # in every process: they change together
        if rank == size - 1 and step == kill_at:
            kill_once(folder)
        if (step + 1) % EVERY == 0:
            dr.save(folder / "last", **run, extra={"step": step + 1})  # in every process too

    if rank == 0:
        print(f"step {steps}: loss {loss.item():.4f}, {model.module[0].form}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="the length of the run")
    parser.add_argument("--folder", type=Path, default=Path("runs/several"), help="of the run")
    parser.add_argument("--kill-at", type=int, help="the step at which one process is killed")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.folder, arguments.kill_at)
