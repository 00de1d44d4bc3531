"""DTensors, of which each process holds a shard: gathered to one process, made of whole tensors."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "is_dtensor", "like_shards", "local_part"]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor.

    Example:
        >>> is_dtensor(torch.ones(2))
        False
    """
    return type(tensor.data).__name__ == "DTensor"  # by name: its module is slow to import


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a DTensor, all of any other."""
    return cast(Any, tensor.detach()).to_local() if is_dtensor(tensor) else tensor


@torch.no_grad()
def gather(tensor: Tensor, owner: int, device: torch.device) -> Tensor | None:
    """A DTensor's whole value in one process; None in the others, which never have more than parts.

    All processes that share the tensor must call it. Those whose shards are copies of the ones in
    the owner's group (HSDP) have nothing to send.

    Args:
        tensor: with the same placements in all processes.
        owner: the process, by its global rank.
        device: the device to gather on.
    """
    from torch.distributed.tensor import Shard

    whole, mine = cast(Any, tensor.detach()), dist.get_rank() == owner
    split = [(axis, p) for axis, p in enumerate(whole.placements) if not p.is_replicate()]
    if not split:
        return whole.to_local().to(device, copy=True) if mine else None
    if len(split) > 1 or type(split[0][1]) is not Shard:  # not of FSDP2's: means of rows, say
        value = whole.full_tensor()
        return value.to(device) if mine else None
    axis, dim = split[0][0], split[0][1].dim
    group = whole.device_mesh.get_group(axis)
    if owner not in dist.get_process_group_ranks(group):
        return None
    return _gather(whole.to_local().to(device), dim, whole.shape[dim], group, owner)


def _gather(local: Tensor, dim: int, size: int, group: Any, owner: int) -> Tensor | None:
    """Parts along a dimension of this size, as ``torch.chunk`` makes them, put together again."""
    count, shape = dist.get_world_size(group), [*local.shape]
    shape[dim] = math.ceil(size / count)
    padded = local.new_zeros(shape)  # the last parts may be smaller, or empty
    padded.narrow(dim, 0, local.shape[dim]).copy_(local)
    sent = padded.view(-1).view(torch.uint8)  # no backend has every dtype
    parts = [torch.empty_like(sent) for _ in range(count)] if dist.get_rank() == owner else None
    dist.gather(sent, parts, dst=owner, group=group)
    if parts is None:
        return None
    values = [part.view(local.dtype).view(shape) for part in parts]
    return torch.cat(values, dim).narrow(dim, 0, size).contiguous()


@torch.no_grad()
def like_shards(value: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor as a DTensor: split as another one along the sides that they share.

    Args:
        value: the same in all processes.
        sharded: a DTensor; a side that ``value`` has not is not split.
    """
    from torch.distributed.tensor import DTensor, Replicate

    like = cast(Any, sharded.detach())
    mesh, placements, local = like.device_mesh, list[Any](), value.detach()
    for axis, placement in enumerate(like.placements):
        dim = getattr(placement, "dim", None)
        if dim is None or value.ndim != like.ndim or value.shape[dim] != like.shape[dim]:
            placements.append(Replicate())
            continue
        placements.append(placement)
        size = math.ceil(value.shape[dim] / mesh.size(axis))
        start = min(mesh.get_local_rank(axis) * size, value.shape[dim])
        local = local.narrow(dim, start, min(size, value.shape[dim] - start))
    local = local.to(like.to_local().device, copy=True).contiguous()
    shape, stride = value.shape, value.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
