"""Batch normalization after a change that is not exact: its running statistics, taken anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

__all__ = ["recalibrate_batch_norms"]


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
