"""What ``train`` and ``Recorder`` do in several processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from process_pool import Pools
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dynarank as dr
from dynarank.distributed.processes import independent, processes_of
from dynarank.records import PhaseRecord, read_run
from dynarank.train.global_batch_norm import GlobalBatchNorm


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        self.head, self.last = nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.conv(x))).mean((2, 3))
        return self.last(self.head(x))


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(5, 2, 3, 3) for _ in range(4)]


def steps(model: nn.Module, rank: int, size: int, group: Any) -> list[Tensor]:
    """Train on this process's rows; returns parameters and buffers."""
    model = model.double()
    net = DistributedDataParallel(model, process_group=group) if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in batches():
        share = x.double()[rank * 5 // size : (rank + 1) * 5 // size]
        if size > 1:
            with GlobalBatchNorm(group, counts=True):
                output = net(share)
        else:
            output = net(share)
        (output.pow(4).sum() / 5 * size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [x.detach() for x in (*model.parameters(), *model.buffers())]


def normed() -> float:
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    found = steps(Norms(), rank, size, group)
    with independent():
        wanted = steps(Norms(), 0, 1, None)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("size", [2, 3])
def test_batch_norm_has_the_statistics_of_the_whole_batch(processes: Pools, size: int) -> None:
    assert max(processes(size)(normed)) < 1e-12


def kept_layout() -> bool:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 3))
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    dr.factorize(model, rank=4)
    strides = [p.stride() for p in model.parameters()]
    processes_of(model).agree("the strides", strides)
    return True


def test_channels_last_layers_have_one_layout_in_all_processes(processes: Pools) -> None:
    assert processes(2)(kept_layout) == [True, True]


def record(folder: str, wrapped: bool) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    net = DistributedDataParallel(model) if wrapped else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = dr.schedules.dynamic_rank(rank=2, inflate=3, deflate=6)
    ranks = dr.RankScheduler(net, optimizer, schedule, total_steps=8, layers="0")
    said: list[str] = []
    loss = torch.zeros(())
    with (
        warnings.catch_warnings(),
        dr.Recorder(folder, ranks, epochs=2, save_model=True, say=said.append) as recorder,
    ):
        for _ in range(2):
            for _ in range(4):
                loss = net(torch.randn(4, 8)).square().mean()
                loss.backward()
                if not wrapped:
                    for p in model.parameters():
                        if p.grad is not None:
                            dist.all_reduce(p.grad)
                optimizer.step()
                ranks.step()
                optimizer.zero_grad()
                recorder.log(loss=loss)
            recorder.epoch(test_loss=loss)
    return said


@pytest.mark.parametrize("wrapped", [True, False])
def test_of_several_recorders_the_first_writes(
    processes: Pools, tmp_path: Path, wrapped: bool
) -> None:
    said = processes(2)(record, str(tmp_path / "run"), wrapped)
    assert said[1] == [] and "report.html" in said[0][-1]
    run = read_run(tmp_path / "run")
    assert not run.damage and run.header.processes == 2 and run.header.backend == "gloo"
    assert run.summary is not None
    found = [p.all_reduced_bytes_per_step for p in run.all(PhaseRecord)]
    assert found == [4 * p.trainable_parameters for p in run.all(PhaseRecord)]
    assert run.summary.all_reduced_bytes == 3 * found[0] + 3 * found[1] + 2 * found[2]
