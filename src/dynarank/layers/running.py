"""Running a model without leaving a trace in it or in the random state."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Inside, passes of the model write into copies of its buffers and draw from a copied state.

    Afterwards the model has its own buffers again, the same objects, unwritten, so that nothing
    that waits for its backward pass is disturbed; and torch's random generators, of the CPU and of
    the model's devices, are where they were. What a forward hook or a module writes elsewhere is
    not undone.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
        >>> with undisturbed(model):
        ...     y = model(torch.ones(2, 4))
        >>> int(model[0].num_batches_tracked)
        0
    """
    own: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
    with ExitStack() as stack:
        for kind, indices in _devices(model).items():
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        try:
            for module in model.modules():
                buffers = module._buffers  # pyright: ignore[reportPrivateUsage]
                own.append((buffers, dict(buffers)))
                buffers.update({n: None if b is None else b.clone() for n, b in buffers.items()})
            yield
        finally:
            for buffers, before in own:
                buffers.clear()
                buffers.update(before)


def _devices(model: nn.Module) -> dict[str, list[int]]:
    """The indices of the model's devices, by type; the CPU's state is saved with any."""
    found: dict[str, set[int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        device = tensor.device
        if device.type not in ("cpu", "meta"):
            found.setdefault(device.type, set()).add(device.index or 0)
    return {kind: sorted(indices) for kind, indices in found.items()} or {"cuda": []}
