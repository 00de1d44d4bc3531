"""Buffers that a training step writes must be those of the whole batch, so alike in all processes.

BatchNorm's are (:mod:`dynarank.train.global_batch_norm`); what other layers average of their
inputs, as ``nn.InstanceNorm2d(track_running_stats=True)`` or a codebook do, is of each process's
own share, and evaluation would see that of the first process only.
"""

from __future__ import annotations

import math

from torch import nn

from dynarank.distributed.processes import Processes
from dynarank.train.recipe_error import RecipeError

__all__ = ["check_buffers"]

_ROUNDING = 1e-4  # relative, of sums of squares


def check_buffers(model: nn.Module, processes: Processes) -> None:
    """Check after a step that floating-point buffers are alike in all processes.

    Raises:
        RecipeError: they are not; in all processes.

    Example:
        >>> check_buffers(nn.BatchNorm1d(4), Processes())
    """
    own = {
        name: float(buffer.detach().double().square().sum())
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
    }
    of_all = processes.gather("buffers after a step", own)
    wrong = [name for name in own if not _alike([one.get(name, -1.0) for one in of_all])]
    if wrong:
        raise RecipeError(
            f"after a step, {', '.join(map(repr, wrong[:3]))}{' and others' * (len(wrong) > 3)} "
            f"differ between the {processes.size} processes: a layer averages over its inputs, "
            "and each process has only its share of a batch, which gives another network than "
            "training in one process; train it in one process, without torchrun, or use BatchNorm"
        )


def _alike(values: list[float]) -> bool:
    if any(map(math.isnan, values)):
        return all(map(math.isnan, values))
    return all(math.isclose(one, values[0], rel_tol=_ROUNDING, abs_tol=1e-12) for one in values)
