"""A step of a run without batches."""

from __future__ import annotations

from dynarank.forms import Change
from dynarank.scheduler.rank_scheduler import RankScheduler


def one_step(ranks: RankScheduler) -> list[Change]:
    """Step the optimizers, which have no gradients, and then the rank scheduler."""
    for optimizer in ranks.optimizer:
        optimizer.step()
    return ranks.step()
