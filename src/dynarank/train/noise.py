"""Records of a run's gradient noise scale: once per epoch, from a few batches in halves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from dynarank.contrib.noise_scale import NoiseMonitor
from dynarank.records import NoiseRecord, Record
from dynarank.train.loop import Trainer
from dynarank.train.shares import rows_of

__all__ = ["NoiseRecorder", "halves"]

BATCHES = 4  # per epoch: a single batch is too noisy, and each costs a training step


class NoiseRecorder:
    """Measures the gradient noise scale of a trainer's model. Experimental.

    Args:
        trainer: the trainer of the run.
        write: called with each record.
    """

    def __init__(self, trainer: Trainer, write: Callable[[Record], None]) -> None:
        self.trainer, self.write = trainer, write
        self.monitor = NoiseMonitor(trainer.model, decay=0.5)

    def read(self, epoch: int) -> None:
        """Measure the noise scale after this many epochs, on batches of the next epoch."""
        trainer = self.trainer
        trainer.model.train()
        reading = None
        for batch in islice(trainer.task.epoch(epoch), BATCHES):
            samples = trainer.recipe.batch_size // 2
            reading = self.monitor.measure(self._loss, halves(batch, samples), samples)
        if reading is not None:
            self.write(
                NoiseRecord(
                    epoch=trainer.epochs_done,
                    step=trainer.done,
                    noise_scale=reading.noise_scale,
                    layers=dict(reading.layers),
                )
            )

    def _loss(self, batch: Any) -> Tensor:
        with self.trainer.machine.autocast():
            return self.trainer.task.loss(self.trainer.model, batch)[0]


def halves(batch: Any, samples: int) -> Iterator[Any]:
    """The first and second half of a batch.

    Example:
        >>> import torch
        >>> [part["x"].tolist() for part in halves({"x": torch.arange(4)}, 2)]
        [[0, 1], [2, 3]]
    """
    for begin in (0, samples):
        yield rows_of(batch, slice(begin, begin + samples))
