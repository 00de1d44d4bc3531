"""BatchNorm over the batches of all processes: the statistics are those of the whole batch.

Legend: C channels; n the number of values of a channel, in all processes together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["GlobalBatchNorm"]


class GlobalBatchNorm(TorchFunctionMode):
    """A context in which ``F.batch_norm`` in training takes the statistics of all processes.

    It is what every BatchNorm layer calls, and works where ``nn.SyncBatchNorm`` does not, on CPUs.
    The sum of the processes' losses has then the gradients that it has in one process.

    Args:
        group: the process group.
        counts: whether the input of this process is part of the batch.
    """

    def __init__(self, group: Any, *, counts: bool) -> None:
        super().__init__()
        self._group, self._counts = group, counts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch, or this in place of ``F.batch_norm``."""
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = self._over_all(torch.cat([x.sum(dims), count]))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centered = x - mean.view(shape)
        var = self._over_all(centered.square().sum(dims)) / n
        _update(running_mean, mean, momentum)
        _update(running_var, var * (n / (n - 1)), momentum)
        found = centered * torch.rsqrt(var + eps).view(shape)
        found = found if weight is None else found * weight.view(shape)
        found = found if bias is None else found + bias.view(shape)
        return found.to(input.dtype)

    def _over_all(self, sums: Tensor) -> Tensor:
        return _Sum.apply(sums if self._counts else sums * 0, self._group)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, total = group, x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


@torch.no_grad()
def _update(running: Tensor | None, found: Tensor, momentum: float) -> None:
    if running is not None:
        running.lerp_(found.to(running.dtype), momentum)
