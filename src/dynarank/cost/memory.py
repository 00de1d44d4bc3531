"""The peak memory of a training step, measured on the step itself."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

__all__ = ["MemoryProbe", "probe_memory", "tensor_bytes"]


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
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield probe
    kept = [*model.parameters(), *model.buffers()]
    for tensor in kept:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    state = [v for one in states for v in one.values() if isinstance(v, Tensor)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    probe.peak_bytes = sum(saved.values()) + tensor_bytes([*kept, *state, *gradients])


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The total size of the tensors' entries in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
