"""What the processes of the tests of checkpoints do: train, save, load, in each kind of wrapper."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from faults import at_calls, failing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dynarank as dr
from dynarank.checkpoint.snapshot import restore, take
from dynarank.checkpoint.steps import Checkpoints
from dynarank.distributed.dtensors import is_dtensor
from dynarank.distributed.processes import processes_of

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
        inputs = next(module for module in model.modules() if isinstance(module, nn.Linear))
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, inputs.in_features, generator=generator)
        model(x.chunk(size)[rank()]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Any) -> Tensor:
    found = tensor.full_tensor() if is_dtensor(tensor) else tensor
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


def load_and_tell(
    kind: str, folder: Path, other_forms: bool = False
) -> tuple[dict[str, Tensor], list[str], Any]:
    """The state that was loaded, the warnings of the checkpoint, and the extra part."""
    model, optimizer = build(kind, seed=1, plan={} if other_forms else None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        extra = dr.load(folder, model=model, optimizer=optimizer)
    texts = [str(one.message) for one in said]
    return state_of(model, optimizer), [text for text in texts if "checkpoint" in text], extra


def whole_run(kind: str, folder: Path) -> dict[str, Tensor]:
    """Six steps, saved after the third."""
    model, optimizer = build(kind)
    train(model, optimizer, range(3))
    dr.save(folder, model=model, optimizer=optimizer)
    train(model, optimizer, range(3, 6))
    return state_of(model, optimizer)


def second_half(kind: str, folder: Path, other_forms: bool = False) -> dict[str, Tensor]:
    model, optimizer = build(kind, seed=1, plan={} if other_forms else None)
    dr.load(folder, model=model, optimizer=optimizer)
    train(model, optimizer, range(3, 6))
    return state_of(model, optimizer)


def said(call: Callable[[], object]) -> str:
    """The type and text of what a call raises."""
    try:
        return repr(call())
    except (ValueError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def save_elsewhere(folder: Path) -> str:
    model, optimizer = build("ddp")
    return said(lambda: dr.save(folder / str(rank()), model=model, optimizer=optimizer))


def save_optimizer_in_one(folder: Path) -> str:
    model, optimizer = build("fsdp")
    train(model, optimizer, range(1))
    return said(lambda: dr.save(folder, model=model, optimizer=None if rank() else optimizer))


def save_on_a_full_disk(
    kind: str, folder: Path, failing_rank: int
) -> tuple[str, dict[str, Tensor]]:
    """A save that fails in one process; what can be loaded from the folder afterwards."""
    train_and_save(kind, folder)
    model, optimizer = build(kind)
    train(model, optimizer, range(5))
    fails = failing(lambda _, name: name == "write", errno.ENOSPC)
    with at_calls(fails) if rank() == failing_rank else nullcontext():
        text = said(lambda: dr.save(folder, model=model, optimizer=optimizer))
    return text, load_and_tell(kind, folder)[0]


def load_damaged(kind: str, folder: Path) -> tuple[str, bool]:
    model, optimizer = build(kind, seed=1)
    before = state_of(model, optimizer)
    text = said(lambda: dr.load(folder, model=model, optimizer=optimizer))
    after = state_of(model, optimizer)
    return text, all(torch.equal(after[name], before[name]) for name in before)


def load_into_another_optimizer(kind: str, folder: Path) -> tuple[str, bool]:
    """In the second process; nothing may change in the first either."""
    model, adam = build(kind, seed=1)
    before, sgd = state_of(model, adam), torch.optim.SGD(adam.param_groups[0]["params"])
    states = torch.get_rng_state()
    text = said(lambda: dr.load(folder, model=model, optimizer=sgd if rank() == 1 else adam))
    after = state_of(model, adam)
    unchanged = all(torch.equal(after[name], before[name]) for name in before | after)
    return text, unchanged and torch.equal(states, torch.get_rng_state())


def accumulate(model: Any, steps: range) -> None:
    """Backward passes without synchronization: each process has gradients of its own."""
    with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
        for step in steps:
            x = torch.randn(16, 7, generator=torch.Generator().manual_seed(step))
            model(x.chunk(dist.get_world_size())[rank()]).square().mean().backward()


def saved_within_an_accumulation(folder: Path) -> dict[str, Tensor]:
    model, optimizer = build("ddp")
    train(model, optimizer, range(2))
    accumulate(model, range(2, 4))
    dr.save(folder, model=model, optimizer=optimizer)
    train(model, optimizer, range(4, 6))
    return state_of(model, optimizer)


def resumed_within_an_accumulation(folder: Path) -> dict[str, Tensor]:
    model, optimizer = build("ddp", seed=1)
    dr.load(folder, model=model, optimizer=optimizer)
    train(model, optimizer, range(4, 6))
    return state_of(model, optimizer)


def gradients_loaded(kind: str, folder: Path) -> dict[str, Tensor]:
    model, optimizer = build(kind, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dr.load(folder, model=model, optimizer=optimizer)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: whole(p.grad) for name, p in inner.named_parameters() if p.grad is not None}


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-????????"))


def steps_saved(kind: str, folder: Path) -> tuple[list[int], int | None]:
    """A run with checkpoints in the background, while the processes also talk by themselves."""
    model, optimizer = build(kind)
    checkpoints = Checkpoints(folder)
    for step in range(1, 6):
        train(model, optimizer, range(step, step + 1))
        checkpoints.save(step, take(model=model, optimizer=optimizer))
        processes_of(model).agree("something else", step)
    checkpoints.close()
    return steps_in(folder), checkpoints.last_acknowledged


def newest(kind: str, folder: Path) -> tuple[int, dict[str, Tensor], list[str]]:
    told: list[str] = []
    model, optimizer = build(kind, seed=1)
    found = Checkpoints(folder, warn=told.append).newest()
    assert found is not None
    restore(found[1], model=model, optimizer=optimizer)
    return found[0], state_of(model, optimizer), told


def steps_on_a_full_disk(folder: Path) -> tuple[list[str], list[int], int | None]:
    """The second process cannot write one of three checkpoints."""
    model, optimizer = build("ddp")
    told: list[str] = []
    checkpoints = Checkpoints(folder, warn=told.append, background=False)
    for step in range(3):
        fails = failing(lambda _, name: name == "write", errno.ENOSPC)
        with at_calls(fails) if (rank(), step) == (1, 1) else nullcontext():
            checkpoints.save(step, take(model=model, optimizer=optimizer))
    return told, steps_in(folder), checkpoints.last_acknowledged


def scheduled_run(kind: str, folder: Path, start: int, stop: int) -> dict[str, Tensor]:
    """Steps of a schedule's run of twelve, through its phases; saved at the end."""
    torch.manual_seed(start)
    model: nn.Module = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0])
        fully_shard(model)
    model = DistributedDataParallel(model) if kind == "ddp" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = dr.schedules.dynamic_rank(rank=4, inflate=4 / 12, deflate=8 / 12)
    ranks = dr.RankScheduler(model, optimizer, schedule, total_steps=12, layers=["0", "2"])
    run: dict[str, Any] = {"model": model, "optimizer": optimizer, "ranks": ranks}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert start == (dr.load(folder / str(start), **run) if start else 0)
    for step in range(start, stop):
        train(model, optimizer, range(step, step + 1))
        ranks.step()
    dr.save(folder / str(stop), **run, extra=stop)
    return state_of(model, optimizer)


def save_unreduced() -> str:
    """Within an accumulation that FSDP2 does not reduce."""
    model, optimizer = build("fsdp")
    unit: Any = model
    unit.set_requires_gradient_sync(False)
    accumulate(model, range(1))
    return said(lambda: dr.save("never", model=model, optimizer=optimizer))
