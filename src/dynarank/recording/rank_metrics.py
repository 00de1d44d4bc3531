"""Records of a run's rank metrics: spectra, and less often heatmaps of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from dynarank.monitors.heatmap import heatmap
from dynarank.monitors.spectral import SpectralMonitor
from dynarank.records import HeatmapRecord, LayerSpectrum, Record, SpectrumRecord
from dynarank.schedules.readings import SpectralReading
from dynarank.surgery.selection import select
from dynarank.surgery.sites import survey

__all__ = ["PICTURES", "VALUES", "RankMetricsRecorder", "evenly"]

VALUES = 64  # singular values kept per layer
PICTURES = 10  # epochs with heatmaps, including the start and the end
PICTURED = 12  # layers with heatmaps

_T = TypeVar("_T")


class RankMetricsRecorder:
    """Records spectra and heatmaps of a model's weights, without changing the run.

    Args:
        model: the model.
        monitor: reads its spectra.
        layers: the paths of the layers of which a few have heatmaps.
        write: called with each record.
        now: the epochs and the steps done.
    """

    def __init__(
        self,
        model: nn.Module,
        monitor: SpectralMonitor,
        layers: Sequence[str],
        write: Callable[[Record], None],
        now: Callable[[], tuple[float, int]],
    ) -> None:
        self.model, self.monitor, self.write, self.now = model, monitor, write, now
        self._pictured = evenly(layers, PICTURED)

    def read(self, *, pictures: bool) -> None:
        """Record the weights as they are."""
        self._write(self.monitor.read())
        if pictures:
            sites = select(survey(self.model), lambda module, path: path in self._pictured)
            found = {site.path: _short(heatmap(site.effective())) for site in sites}
            done, step = self.now()
            self.write(HeatmapRecord(epoch=done, step=step, layers=found))

    def step(self) -> None:
        """Count an optimizer step, and record the spectra if a reading is due."""
        if (readings := self.monitor.step()) is not None:
            self._write(readings)

    def decided_by(self, readings: Mapping[str, SpectralReading]) -> None:
        """Record the readings on which the schedule decides, before it changes anything."""
        if readings:
            self._write(readings)

    def _write(self, readings: Mapping[str, SpectralReading]) -> None:
        done, step = self.now()
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
