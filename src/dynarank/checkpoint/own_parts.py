"""What each process has for itself: random states, buffers, gradients that are not averaged yet.

The first process's are in the parts ``random`` and ``gradients``, those of each other one in a part
of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dynarank.checkpoint.folder import Contents
from dynarank.checkpoint.gradients import mean
from dynarank.checkpoint.shards import piece_like
from dynarank.checkpoint.tree import unflatten
from dynarank.distributed.dtensors import is_dtensor
from dynarank.distributed.processes import Processes

__all__ = ["OwnParts", "own_part"]


def own_part(rank: int) -> str:
    """The name of a process's own part.

    Example:
        >>> own_part(1)
        'process-00001'
    """
    return f"process-{rank:05d}"


class OwnParts:
    """The own parts of the processes that wrote a checkpoint, for those that load it.

    Args:
        contents: the checkpoint.
        parts: its parts for all.
        processes: those that load it.
    """

    def __init__(self, contents: Contents, parts: Mapping[str, Any], processes: Processes) -> None:
        self._contents, self._parts, self._processes = contents, parts, processes
        self._size = int(contents.data["structure"].get("processes", 1))

    def random(self) -> dict[str, Any] | None:
        """The random states for this process, if there are any."""
        rank = self._processes.rank
        known = self._parts["random"] is not None and rank < self._size
        return self._of(rank)["random"] if known else None

    def warn_of_others(self) -> None:
        """Warn, in the first process, if there were more or fewer of them."""
        rank, size = self._processes.rank, self._processes.size
        if self._parts["random"] is not None and size != self._size and rank == 0:
            warnings.warn(_said(self._size, size), UserWarning, stacklevel=4)

    def gradients(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The gradients for this process: its own, or the mean where pieces or numbers differ."""
        likes = {name: p for name, p in model.named_parameters() if is_dtensor(p)}
        ranks = range(self._size)
        if self._size == self._processes.size and not likes:
            ranks = range(self._processes.rank, self._processes.rank + 1)
        rows, first = [self._of(rank)["gradients"] for rank in ranks], self._parts["gradients"]
        if all(row is None for row in rows):
            return first
        own = [row and {n: piece_like(g, likes.get(n)) for n, g in row.items()} for row in rows]
        return mean([first if row is None else row for row in own])

    def buffers(self) -> Mapping[str, Tensor]:
        """The buffers that this process had for itself, if it is one of as many."""
        alike = self._size == self._processes.size
        return self._of(self._processes.rank)["buffers"] if alike else {}

    def _of(self, rank: int) -> Mapping[str, Any]:
        if rank == 0:
            return {"random": self._parts["random"], "gradients": None, "buffers": {}}
        name = own_part(rank)
        return unflatten(self._contents.data[name], self._contents.read(name), name)


def _said(then: int, now: int) -> str:
    wrote = f"{then} processes wrote" if then > 1 else "one process wrote"
    ranks = f"processes 0 to {min(then, now) - 1} get" if min(then, now) > 1 else "process 0 gets"
    rest = "the others keep theirs" if now > then else "those of the others are not used"
    return (
        f"{wrote} the checkpoint that {now} load: {ranks} the random states of then, {rest}. "
        "Training goes on up to rounding, and with other random numbers"
    )
