"""The peak memory of a training step, measured on the step itself."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

__all__ = ["MemoryProbe", "SavedTensors", "probe_memory", "saved_tensors", "tensor_bytes"]


@dataclass
class MemoryProbe:
    """The peak memory measured by :func:`probe_memory`, in bytes; 0 until the block has ended."""

    peak_bytes: int = 0


@contextmanager
def probe_memory(
    model: nn.Module, optimizers: Sequence[Optimizer], device: torch.device
) -> Generator[MemoryProbe]:
    """A context that measures the peak memory of the training step inside it.

    On CUDA this is the allocator's peak. On other devices it is the sum of the tensors alive when
    the backward pass begins: parameters and buffers, gradients, optimizer state, and the tensors
    that autograd saved for the backward pass; each storage counts once. Workspaces of single
    operations are then not included.
    """
    probe = MemoryProbe()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield probe
        probe.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    with saved_tensors() as saved:
        yield probe
    kept = [*model.parameters(), *model.buffers()]
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    state = [v for one in states for v in one.values() if isinstance(v, Tensor)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    probe.peak_bytes = saved.bytes_without(kept) + tensor_bytes([*kept, *state, *gradients])


class SavedTensors:
    """The storages that autograd has saved for the backward pass, each once."""

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> Tensor:
        """Note a saved tensor."""
        self._bytes[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes_without(self, kept: Iterable[Tensor]) -> int:
        """The size of the storages in bytes, but for those of these tensors."""
        own = set(map(_place, kept))
        return sum(size for place, size in self._bytes.items() if place not in own)


def _place(tensor: Tensor) -> int:
    """What distinguishes a storage while it is alive; on the meta device no address does."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata if tensor.is_meta else storage.data_ptr()


@contextmanager
def saved_tensors() -> Generator[SavedTensors]:
    """A context that notes what autograd saves in it.

    Example:
        >>> x = torch.ones(8, 4, requires_grad=True)
        >>> with saved_tensors() as saved:
        ...     y = (x * x).exp()
        >>> saved.bytes_without([x])
        128
    """
    saved = SavedTensors()
    with saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The total size of the tensors' entries in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
