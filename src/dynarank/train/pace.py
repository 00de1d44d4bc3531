"""What the processes of a run decide together after each step: to go on, to save, or to stop."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import TypeVar

import torch
import torch.distributed as dist

from dynarank.train.loop import Trainer

__all__ = ["Pace"]

_T = TypeVar("_T")


class Pace:
    """Keeps the processes of a run at the same step; one process alone decides for itself.

    Args:
        trainer: the trainer of the run in this process.
        stop: the number of a signal that asks this process to stop.
    """

    def __init__(self, trainer: Trainer, stop: Callable[[], int | None]) -> None:
        self._trainer, self._stop = trainer, stop

    def after_step(self, save: bool = False) -> int | None:
        """Whether a signal asks any process to stop; the states to be saved are collected.

        Args:
            save: whether a checkpoint is due, in the process that writes them.
        """
        if (processes := self._trainer.processes).size == 1:
            return self._stop()
        found = processes.gather("what follows the step", (self._stop(), save))
        signum = next((signum for signum, _ in found if signum is not None), None)
        if signum is not None or any(due for _, due in found):
            self._trainer.gather_states()
        return signum

    def after_epoch(self, save: bool = False) -> None:
        """Collect the states if a checkpoint is due; a signal is looked for after each step."""
        processes = self._trainer.processes
        if processes.size > 1 and any(processes.gather("what follows the epoch", save)):
            self._trainer.gather_states()

    def told(self, value: _T) -> _T:
        """The first process's value, which may be large."""
        processes = self._trainer.processes
        if processes.size > 1:
            held = BytesIO()
            torch.save(value, held)  # pickle cannot read unsigned tensors back (NumPy's generator)
            sent = [held.getvalue()]
            dist.broadcast_object_list(sent, group=processes.control, group_src=0)
            return torch.load(BytesIO(sent[0]), weights_only=False)
        return value
