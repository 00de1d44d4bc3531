"""The gradients of an unfinished accumulation, which may differ between processes.

Under DDP's ``no_sync`` each process has its own, whose mean is taken later. So another number of
processes goes on with the mean in each: the mean of means is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dynarank.distributed.dtensors import is_dtensor
from dynarank.distributed.fsdp2 import has_unreduced_gradients
from dynarank.distributed.processes import Processes

__all__ = ["differing", "gradients_of", "mean", "set_gradients"]


def gradients_of(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """The gradients by name: none if all of them are zero, in all processes.

    Raises:
        ValueError: FSDP2 has gradients that are not reduced over the processes yet.
    """
    if has_unreduced_gradients(model.modules()):
        raise ValueError(
            "gradients are not reduced over the processes yet (set_requires_gradient_sync(False) "
            "or set_requires_all_reduce(False)), and a checkpoint would lose them: save after "
            "optimizer.step()"
        )
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    some = any(bool(_local(grad).any()) for grad in found.values())
    return found if any(processes.gather("whether there are gradients", some)) else {}


def differing(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Those that differ from the first process's; pieces of sharded ones do not count."""
    own = {n: _digest(t) for n, t in tensors.items() if processes.size > 1 and not is_dtensor(t)}
    first = processes.from_first("the tensors of the first process", own)
    return {name: tensors[name] for name, digest in own.items() if first.get(name) != digest}


def mean(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the gradients of several processes; none counts as zero."""
    sums: dict[str, Tensor] = {}
    for row in rows:
        for name, grad in row.items():
            sums[name] = sums[name] + grad if name in sums else grad
    return {name: total / len(rows) for name, total in sums.items()}


@torch.no_grad()
def set_gradients(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give each parameter its gradient, or none."""
    for name, p in model.named_parameters():
        grad = saved.get(name)
        p.grad = None if grad is None else torch.empty_like(p, dtype=grad.dtype).copy_(grad)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).digest()
