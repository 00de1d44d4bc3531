"""DTensors, of which each process holds a shard: gathered to one process, and dealt by one."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "is_dtensor", "local_part", "scatter", "whole"]


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
def whole(tensor: Tensor) -> Tensor:
    """A tensor's whole value in each process; all that share a DTensor must call it."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    split = cast(Any, tensor.detach())
    local, at = split.to_local(), split.device_mesh.device_type
    if local.device.type != at:  # offloaded to the CPU: the backend may be another device's
        mesh, shape, stride = split.device_mesh, split.shape, split.stride()
        moved = local.to(at), mesh, split.placements
        split = DTensor.from_local(*moved, run_check=False, shape=shape, stride=stride)
    return split.full_tensor().to(local.device)


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

    shared, mine = cast(Any, tensor.detach()), dist.get_rank() == owner
    split = [(axis, p) for axis, p in enumerate(shared.placements) if not p.is_replicate()]
    if not split:
        return shared.to_local().to(device, copy=True) if mine else None
    if len(split) > 1 or type(split[0][1]) is not Shard:  # not of FSDP2's: means of rows, say
        value = shared.full_tensor()
        return value.to(device) if mine else None
    axis, dim = split[0][0], split[0][1].dim
    group = shared.device_mesh.get_group(axis)
    if owner not in dist.get_process_group_ranks(group):
        return None
    return _gather(shared.to_local().to(device), dim, shared.shape[dim], group, owner)


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
def scatter(
    value: Tensor, like: Tensor, owner: int, device: torch.device, at: torch.device
) -> Tensor:
    """A DTensor of a whole value that one process has; the others receive their shards of it.

    All processes that share it must call it.

    Args:
        value: the whole in the owner's process; elsewhere only its shape and dtype are read.
        like: a DTensor; the value is split as it is, along the sides that both have.
        owner: the process, by its global rank.
        device: the device to send from.
        at: the device of the shards.
    """
    from torch.distributed.tensor import DTensor, Replicate

    dealt, mine = cast(Any, like.detach()), dist.get_rank() == owner
    mesh, placements, shape = dealt.device_mesh, list[Any](), [*value.shape]
    here, there = [*mesh.get_coordinate()], (mesh.mesh == owner).nonzero()[0].tolist()
    local = value.detach().to(device) if mine else torch.empty(0, dtype=value.dtype, device=device)
    for axis in reversed(range(mesh.ndim)):
        dim, group = getattr(dealt.placements[axis], "dim", None), mesh.get_group(axis)
        if dim is not None and (value.ndim != dealt.ndim or shape[dim] != dealt.shape[dim]):
            dim = None
        placements.insert(0, Replicate() if dim is None else dealt.placements[axis])
        if here[:axis] == there[:axis]:
            source = int(mesh.mesh[(*here[:axis], there[axis], *here[axis + 1 :])])
            local = _deal(local, shape, dim, group, source)
        if dim is not None:
            shape[dim] = _length(shape[dim], group)
    local, stride = local.to(at, copy=True), torch.empty(value.shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=value.shape, stride=stride
    )


def _deal(local: Tensor, shape: list[int], dim: int | None, group: Any, source: int) -> Tensor:
    """This process's part of a tensor of this shape that one of a group has, or all of it."""
    count, mine = dist.get_world_size(group), dist.get_rank() == source
    received = list(shape)
    if dim is not None:
        received[dim] = math.ceil(shape[dim] / count)
    whole = local.contiguous() if mine else local.new_empty(shape if dim is None else received)
    if whole.numel() == 0:
        return local.new_empty(received)
    if dim is None:
        dist.broadcast(whole.view(-1).view(torch.uint8), source, group=group)
        return whole
    part, parts = local.new_empty(received), None
    if mine:
        padded = whole.new_zeros([*shape[:dim], received[dim] * count, *shape[dim + 1 :]])
        padded.narrow(dim, 0, shape[dim]).copy_(whole)
        parts = [p.contiguous().view(-1).view(torch.uint8) for p in padded.chunk(count, dim)]
    dist.scatter(part.view(-1).view(torch.uint8), parts, source, group=group)
    return part.narrow(dim, 0, _length(shape[dim], group)).contiguous()


def _length(size: int, group: Any) -> int:
    """How much of a side this process has, as ``torch.chunk`` splits it over a group."""
    part = math.ceil(size / dist.get_world_size(group))
    return min(part, max(0, size - part * dist.get_rank(group)))
