"""BatchNorm recalibration: running statistics measured again after a truncation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from dynarank.forms import Change, LowRank, same_weight
from dynarank.scheduler.callbacks import Callback, Ranks

__all__ = ["BatchNormRecalibration", "recalibrate_batch_norms"]


class BatchNormRecalibration(Callback):
    """Recalibrates batch norms after weights have been truncated in mid-run.

    Args:
        batches: called for the batches, as :func:`recalibrate_batch_norms` takes them.
    """

    def __init__(self, batches: Callable[[], Iterable[Any]]) -> None:
        self.batches = batches

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        """Recalibrate if a weight was truncated; the first plan is of an untrained model."""
        truncated = (
            isinstance(change.after, LowRank) and not same_weight(change.before, change.after)
            for change in changes
        )
        if ranks.last_step and any(truncated):
            recalibrate_batch_norms(ranks.model, self.batches())


def recalibrate_batch_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set every batch norm's running mean and variance to those of ``batches``.

    A truncated weight gives its batch norm other inputs than the running statistics are of; they
    would follow within some 1 / momentum steps, and evaluation is off until then. Weights, the mode
    of every module and the global random state stay as they are; a model without batch norm is not
    run at all.

    Args:
        model: run in training mode, without gradients.
        batches: inputs, or sequences that begin with one; a few hundred examples suffice.

    Example:
        >>> norm = nn.BatchNorm1d(1, affine=False)
        >>> recalibrate_batch_norms(norm, [torch.tensor([[1.0], [3.0]])])
        >>> norm.running_mean.item()
        2.0
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=list(devices)):
        update_bn(batches, model)
    for module, training in modes.items():  # update_bn restores the root's, and all get it
        module.training = training
