"""Steps of a run without batches."""

from __future__ import annotations

from dynarank.forms import Change
from dynarank.scheduler.rank_scheduler import RankScheduler


def idle_step(ranks: RankScheduler) -> None:
    """Step the optimizers without gradients: it is a step, and nothing moves."""
    held = [p for o in ranks.optimizer for group in o.param_groups for p in group["params"]]
    grads = [(p, p.grad) for p in held]
    for p in held:
        p.grad = None
    for optimizer in ranks.optimizer:
        optimizer.step()
    for p, grad in grads:
        p.grad = grad


def one_step(ranks: RankScheduler) -> list[Change]:
    """Step the optimizers without gradients, and then the rank scheduler."""
    idle_step(ranks)
    return ranks.step()
