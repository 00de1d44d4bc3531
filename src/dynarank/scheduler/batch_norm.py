"""BatchNorm recalibration: running statistics computed again after a truncation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from dynarank.forms import Change, LowRank, same_weight
from dynarank.layers.running import call_model, preserve_state
from dynarank.scheduler.callbacks import Callback, Ranks

__all__ = ["BatchNormRecalibration", "recalibrate_batch_norms"]


class BatchNormRecalibration(Callback):
    """Recalibrates BatchNorm after each truncation during training.

    Args:
        batches: a function that returns the batches for :func:`recalibrate_batch_norms`.

    Example:
        >>> batches = [torch.randn(16, 8)]
        >>> BatchNormRecalibration(lambda: batches).batches() is batches
        True
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


@torch.no_grad()
def recalibrate_batch_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set every BatchNorm's running mean and variance to those of ``batches``.

    Truncating a weight changes the inputs of the BatchNorm that follows. Its running statistics
    adapt within about 1 / momentum steps; until then evaluation uses outdated ones. Weights, other
    buffers, module modes and the global random state do not change, nor do the running statistics
    if an exception is raised. A model without BatchNorm is not run.

    Args:
        model: run in training mode, without gradients.
        batches: as :func:`dynarank.calibrate` takes them; a few hundred examples suffice.

    Raises:
        ValueError: no batch, such as from an iterator that is exhausted.

    Example:
        >>> norm = nn.BatchNorm1d(1, affine=False)
        >>> recalibrate_batch_norms(norm, [torch.tensor([[1.0], [3.0]])])
        >>> norm.running_mean.item()
        2.0
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    found: list[dict[str, Tensor]] = []
    with preserve_state(model, training=True, grad=False):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches
            empty = True
            for batch in batches:
                call_model(model, batch)
                empty = False
            if empty:
                raise ValueError("there is no batch to recalibrate BatchNorm on; give a few")
            found = [dict(norm.named_buffers(recurse=False)) for norm in norms]
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    for norm, statistics in zip(norms, found, strict=True):
        for name, buffer in norm.named_buffers(recurse=False):
            buffer.copy_(statistics[name])
