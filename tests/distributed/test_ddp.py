"""Law 9 under DDP: a run of several processes equals that of one, through every change of form.

The global batch of a step is the same; each process has a share of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import pytest
import torch
import torch.distributed as dist
from process_pool import Pools, spread
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as DDP

import dynarank as dr

STEPS, BATCH, RANK = 15, 16, 4
INFLATE, DEFLATE = 5, 10
Ending = Literal["adapted", "low-rank"]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    return nn.Sequential(*layers)


class WithUnused(nn.Module):
    """A part of it has no gradient in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = mlp(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(16, 4, generator=generator)
    xs = [torch.randn(BATCH, 16, generator=generator) for _ in range(STEPS)]
    return [(x, (x @ teacher).argmax(1)) for x in xs]


def schedule(to: Ending) -> Any:
    return dr.schedules.dynamic_rank(rank=RANK, inflate=INFLATE, deflate=DEFLATE, to=to)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(
    model: nn.Module,
    to: Ending,
    optimizer: torch.optim.Optimizer,
    *,
    accumulate: int = 1,
    share: bool = False,
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses of the global batches, spreads of the parameters after each step, and the moments."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    ranks = dr.RankScheduler(model, optimizer, schedule(to), STEPS)
    losses, spreads = [], []
    for x, y in data():
        total = torch.zeros(())
        for i, (a, b) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)):
            n = len(a) // size
            a, b = a[rank * n : (rank + 1) * n], b[rank * n : (rank + 1) * n]
            last = i == accumulate - 1
            with model.no_sync() if share and not last else _nothing():  # pyright: ignore
                loss = nn.functional.cross_entropy(model(a), b) / accumulate
                loss.backward()
            total += loss.detach()
        if share:
            dist.all_reduce(total)
        losses.append(float(total) / size)
        optimizer.step()
        ranks.step()
        optimizer.zero_grad()
        if share:
            spreads.append(spread(ranks.model))
    inner = ranks.model
    return losses, spreads, moments(inner, optimizer)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name} {key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
        if value is not None and value.ndim > 0
    }


def power_sgd(model: DDP) -> None:
    # A factor of an adapter's has no gradient at first, and zeros cannot be orthogonalized.
    how: dict[str, Any] = {"start_powerSGD_iter": 2, "orthogonalization_epsilon": 1e-8}
    state = powerSGD_hook.PowerSGDState(None, 4, min_compression_rate=1, **how)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def fp16(model: DDP) -> None:
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)


def built_in(model: DDP) -> None:
    kind = dist.BuiltinCommHookType.FP16_COMPRESS  # pyright: ignore
    model._register_builtin_comm_hook(kind)  # pyright: ignore


# How the model is wrapped, the optimizer, micro-batches a step, the tolerance to one process.
CASES: dict[str, tuple[dict[str, Any], Callable[..., Any], int, Callable[[DDP], None], float]] = {
    "plain": ({}, adamw, 1, lambda _: None, 1e-6),
    "momentum": ({}, sgd, 1, lambda _: None, 1e-6),
    "unused": ({"find_unused_parameters": True}, adamw, 1, lambda _: None, 1e-6),
    "static": ({"static_graph": True}, adamw, 1, lambda _: None, 1e-6),
    "views": ({"gradient_as_bucket_view": True}, adamw, 1, lambda _: None, 1e-6),
    "small buckets": ({"bucket_cap_mb": 0.001}, adamw, 1, lambda _: None, 1e-6),
    "accumulation": ({}, adamw, 2, lambda _: None, 1e-6),
    "views, accumulation": ({"gradient_as_bucket_view": True}, sgd, 2, lambda _: None, 1e-6),
    "fp16 hook": ({}, adamw, 1, fp16, 1e-3),
    "built-in hook": ({}, adamw, 1, built_in, 1e-3),
    "PowerSGD": ({}, adamw, 1, power_sgd, 1.0),
}


def run(name: str, to: Ending) -> tuple[Any, ...]:
    options, make, accumulate, hook, _ = CASES[name]
    model = WithUnused() if name == "unused" else mlp()
    wrapper = DDP(model, **options)
    hook(wrapper)
    forward: list[int] = []

    def seen(*_: object) -> None:
        forward.append(1)

    wrapper.register_forward_hook(seen)
    torch.manual_seed(100 + dist.get_rank())  # other seeds after the initial weights
    torch.set_num_threads(1 + dist.get_rank())
    try:
        found = train(wrapper, to, make(model), accumulate=accumulate, share=True)
    finally:
        torch.set_num_threads(1)
    dr.check(wrapper)
    return *found, len(forward), cast(Any, wrapper)._get_ddp_logging_data().get("comm_hook")


@pytest.mark.parametrize("to", ["adapted", "low-rank"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(processes: Pools, name: str, to: Ending) -> None:
    _, make, accumulate, _, tolerance = CASES[name]
    model = WithUnused() if name == "unused" else mlp()
    torch.manual_seed(100)  # as process 0
    losses, _, states = train(model, to, make(model), accumulate=accumulate)
    (theirs, spreads, moved, forwards, hook), other = processes(2)(run, name, to)
    assert max(spreads) == 0.0 == max(other[1])
    assert forwards == STEPS * accumulate
    assert all(map(math.isfinite, theirs))
    assert max(abs(a - b) for a, b in zip(losses, theirs, strict=True)) < tolerance
    if tolerance < 1e-5:
        assert states.keys() == moved.keys()
        for key, value in states.items():
            torch.testing.assert_close(moved[key], value, rtol=1e-4, atol=1e-6, msg=key)
    named = {"built-in hook": "FP16", "fp16 hook": "fp16", "PowerSGD": "powerSGD"}
    assert named.get(name, "") in (hook or "")  # registered again after each change
