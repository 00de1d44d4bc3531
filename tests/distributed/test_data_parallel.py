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
from dynarank.distributed.processes import (
    DisagreementError,
    Processes,
    independent,
    processes_of,
)
from dynarank.records import PhaseRecord, read_run
from dynarank.train.global_batch_norm import GlobalBatchNorm
from dynarank.train.loop import Machine, Trainer
from dynarank.train.recipes import load_recipe
from dynarank.train.tasks import make_task


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


OWN = '''
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

class Rows(Dataset):
    def __len__(self): return 40
    def __getitem__(self, i):
        x = torch.sin(torch.arange(6.0) * (i + 1)) + 0.1 * torch.rand(6)
        return {"x": x, "labels": i % 3 if i % 7 else -100, "name": f"row {i}"}

def data(): return Rows(), Rows()

def sharded():
    sampler = DistributedSampler(Rows())
    return DataLoader(Rows(), batch_size=7, sampler=sampler), Rows()

class Net(nn.Module):
    """It uses one of its heads."""
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 32)
        self.heads = nn.ModuleList(nn.Linear(32, 3) for _ in range(2))
    def forward(self, x, name=None):
        assert name is None or len(name) == len(x)
        return self.heads[1](torch.relu(self.body(x)))
'''
TOML = """
data = "own.py:data"
model = "own.py:Net"
layers = ["body"]
schedules = ["dynamic-rank"]
epochs = 3
batch_size = 7
learning_rate = 0.1
decay_at = [2]
inflate = 1
deflate = 2.2
rank = 2
"""


def own_losses(path: str, *, alone: bool) -> list[float]:
    recipe = load_recipe(path)
    task = make_task(recipe, seed=0, device=torch.device("cpu"))
    machine = Machine(torch.device("cpu"))
    together = Processes() if alone else processes_of()
    trainer = Trainer(
        recipe, "dynamic-rank", task, seed=0, epochs=3, machine=machine, processes=together
    )
    results = map(trainer.train_epoch, range(3))
    return [loss for one in results for loss in (one.train_loss, one.test_loss)]


def own_run(path: str) -> tuple[list[float], list[float]]:
    found = own_losses(path, alone=False)
    with independent():
        return found, own_losses(path, alone=True)


def written(folder: Path, text: str) -> str:
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    (folder / "own.toml").write_text(text, encoding="utf-8")
    return str(folder / "own.toml")


def test_own_data_and_network_train_as_in_one_process(processes: Pools, tmp_path: Path) -> None:
    for found, wanted in processes(2)(own_run, written(tmp_path, TOML)):
        assert found == pytest.approx(wanted, abs=1e-5)


def refused(path: str) -> str:
    with pytest.raises(DisagreementError) as error:
        own_losses(path, alone=False)
    return str(error.value)


def test_data_that_processes_share_out_themselves_is_refused(
    processes: Pools, tmp_path: Path
) -> None:
    recipe = TOML.replace("own.py:data", "own.py:sharded").replace("batch_size = 7", "")
    for text in processes(2)(refused, written(tmp_path, recipe)):
        assert "differ in the first batch of an epoch" in text
