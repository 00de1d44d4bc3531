"""What the processes of the tests of checkpoints do: train, save, load, in each kind of wrapper."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dynarank as dr
from dynarank.checkpoint.shards import is_sharded

PLAN = {"low": dr.LowRank(3), "high": dr.Adapted(2)}


class Network(nn.Module):
    """Sizes that 2 and 4 do not divide, an empty piece, buffers, two dtypes, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.norm, self.high = nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 5)
        self.last = nn.Linear(5, 1).to(torch.bfloat16)
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.high(self.norm(self.low(x)).relu()), 0.5)
        return self.last(hidden.bfloat16()).float() * self.scale


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def build(kind: str, seed: int = 0, plan: Any = None) -> tuple[nn.Module, torch.optim.AdamW]:
    """A model of this kind of wrapper, in forms of ``plan``, and its optimizer."""
    torch.manual_seed(seed)
    model = Network()
    dr.apply_plan(model, PLAN if plan is None else plan)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.last)
        fully_shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(100 * seed + rank())
    return DistributedDataParallel(model) if kind == "ddp" else model, torch.optim.AdamW(trained)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    size = dist.get_world_size() if dist.is_initialized() else 1
    for step in steps:
        x = torch.randn(16, 7, generator=torch.Generator().manual_seed(step))
        model(x.chunk(size)[rank()]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Any) -> Tensor:
    found = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found.detach().cpu().clone()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of the model and of the optimizer, whole, by name."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    found = {name: whole(t) for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{name} {key}"] = whole(value)
    return found


def train_and_save(kind: str, folder: Path, extra: Any = None) -> dict[str, Tensor]:
    model, optimizer = build(kind)
    train(model, optimizer, range(3))
    dr.save(folder, model=model, optimizer=optimizer, extra=extra)
    return state_of(model, optimizer)


def load_and_tell(kind: str, folder: Path) -> tuple[dict[str, Tensor], list[str], Any]:
    """The state that was loaded, the warnings, and the extra part."""
    model, optimizer = build(kind, seed=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        extra = dr.load(folder, model=model, optimizer=optimizer)
    return state_of(model, optimizer), [str(one.message) for one in said], extra


def whole_run(kind: str, folder: Path) -> dict[str, Tensor]:
    """Six steps, saved after the third."""
    model, optimizer = build(kind)
    train(model, optimizer, range(3))
    dr.save(folder, model=model, optimizer=optimizer)
    train(model, optimizer, range(3, 6))
    return state_of(model, optimizer)


def second_half(kind: str, folder: Path) -> dict[str, Tensor]:
    model, optimizer = build(kind, seed=1)
    dr.load(folder, model=model, optimizer=optimizer)
    train(model, optimizer, range(3, 6))
    return state_of(model, optimizer)
