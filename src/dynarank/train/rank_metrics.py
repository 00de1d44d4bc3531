"""Records of a run's rank metrics: spectra every epoch, heatmaps of the weights less often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from dynarank.monitors.heatmap import heatmap
from dynarank.monitors.spectral import SpectralMonitor
from dynarank.records import HeatmapRecord, LayerSpectrum, Record, SpectrumRecord
from dynarank.schedules.readings import SpectralReading
from dynarank.surgery.selection import select
from dynarank.surgery.sites import survey
from dynarank.train.loop import Trainer

__all__ = ["RankMetricsRecorder", "evenly"]

VALUES = 64  # singular values kept per layer
PICTURES = 10  # epochs with heatmaps, including the start and the end
PICTURED = 12  # layers with heatmaps

_T = TypeVar("_T")


class RankMetricsRecorder:
    """Records spectra and heatmaps of a trainer's weights, without changing the run.

    Args:
        trainer: the trainer of the run.
        write: called with each record.
    """

    def __init__(self, trainer: Trainer, write: Callable[[Record], None]) -> None:
        self.trainer, self.write = trainer, write
        recipe = trainer.recipe
        self.monitor = SpectralMonitor(
            trainer.model, rank=recipe.rank, layers=recipe.layers, updates=True, values=VALUES
        )
        self._pictured = evenly(trainer.ranks.layers, PICTURED)
        self._picture_epochs = frozenset(evenly(range(trainer.epochs + 1), PICTURES))

    def read(self, epoch: int) -> None:
        """Record the weights after this many epochs."""
        self._write(self.monitor.read())
        if epoch in self._picture_epochs:
            sites = select(survey(self.trainer.model), lambda module, path: path in self._pictured)
            pictures = {site.path: _short(heatmap(site.effective())) for site in sites}
            done, step = self.trainer.epochs_done, self.trainer.done
            self.write(HeatmapRecord(epoch=done, step=step, layers=pictures))

    def decided_by(self, readings: Mapping[str, SpectralReading]) -> None:
        """Record the readings on which the schedule decides, before it changes anything."""
        if readings:
            self._write(readings)

    def _write(self, readings: Mapping[str, SpectralReading]) -> None:
        done, step = self.trainer.epochs_done, self.trainer.done
        layers = {path: LayerSpectrum(**vars(reading)) for path, reading in readings.items()}
        self.write(SpectrumRecord(epoch=done, step=step, layers=layers))


def _short(picture: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """A heatmap with three significant digits, as many as are visible, in a third of the bytes."""
    return tuple(tuple(float(f"{value:.3g}") for value in row) for row in picture)


def evenly(items: Sequence[_T], most: int) -> list[_T]:
    """At most ``most`` (2 or more) of the items, evenly spaced, including the first and the last.

    Example:
        >>> evenly("abcdefg", 3)
        ['a', 'd', 'g']
    """
    if len(items) <= most:
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / (most - 1))] for i in range(most)]
