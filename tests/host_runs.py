"""What every host is compared with: 24 steps of a plain loop, inflated at 8, deflated at 16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, RankScheduler

STEPS, INFLATE, DEFLATE, RANK = 24, 8, 16, 4
CHANGES = (INFLATE, DEFLATE)
POSITIONS = (4, 8, 12, 16, 20)  # before, at and after each change
ENDINGS = ("adapted", "low-rank")
Batch = tuple[Tensor, Tensor]
Ranks = Callable[[nn.Module, Any], RankScheduler]


def schedule(to: str = "adapted", rank: int = RANK) -> Any:
    """Low-rank, full-rank from step 8, the ending from step 16, of every scheduled layer."""
    return dr.schedules.dynamic_rank(rank, inflate=INFLATE, deflate=DEFLATE, to=to)  # type: ignore[arg-type]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*parts)


def batches(count: int = STEPS, size: int = 8, seed: int = 1) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 16, generator=g), torch.randint(0, 4, (size,), generator=g))
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def ranks_of(model: nn.Module, optimizer: Any, to: str = "adapted", **more: Any) -> RankScheduler:
    return RankScheduler(model, optimizer, schedule(to), STEPS, **more)


def plain_losses(
    to: str = "adapted",
    *,
    accumulate: int = 1,
    model: nn.Module | None = None,
    optimizers: Callable[[nn.Module], Sequence[Optimizer]] | None = None,
    seed: int = 0,
) -> list[float]:
    """The loss of every batch of a plain loop."""
    model = mlp(seed) if model is None else model
    own = [adamw(model)] if optimizers is None else list(optimizers(model))
    ranks = ranks_of(model, own, to)
    losses: list[float] = []
    given = batches(STEPS * accumulate)
    for step in range(STEPS):
        for batch in given[step * accumulate : (step + 1) * accumulate]:
            loss = loss_of(model, batch)
            losses.append(loss.item())
            (loss / accumulate).backward()
        for one in own:
            one.step()
        for one in own:
            one.zero_grad()
        ranks.step()
    return losses


def forms_at(step: int, to: str = "adapted") -> type:
    """The form of the scheduled layers after so many steps."""
    if step < INFLATE:
        return LowRank
    return FullRank if step < DEFLATE else {"adapted": Adapted, "low-rank": LowRank}[to]
