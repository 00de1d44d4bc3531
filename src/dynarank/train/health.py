"""Writes down the rank health of a run's weights: spectra each epoch, pictures now and then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynarank.monitors import SpectralMonitor
from dynarank.readings import SpectralReading
from dynarank.records import LayerSpectrum, Record, SpectrumRecord
from dynarank.train.loop import Trainer

__all__ = ["HealthRecorder", "thinned"]

VALUES = 64  # singular values kept of a layer


class HealthRecorder:
    """Reads a trainer's weights and never changes them.

    Args:
        trainer: the run.
        write: takes each record.
    """

    def __init__(self, trainer: Trainer, write: Callable[[Record], None]) -> None:
        self.trainer, self.write = trainer, write
        recipe = trainer.recipe
        self.monitor = SpectralMonitor(trainer.model, rank=recipe.rank, layers=recipe.layers)

    def begin(self) -> None:
        """The weights as they start."""
        self._spectrum()

    def epoch(self) -> None:
        """The weights after an epoch."""
        self._spectrum()

    def given(self, readings: Mapping[str, SpectralReading]) -> None:
        """What the schedule has been given to decide by, before any change that it made of it."""
        if readings:
            self._write(readings)

    def _spectrum(self) -> None:
        self._write(self.monitor.read())

    def _write(self, readings: Mapping[str, SpectralReading]) -> None:
        layers = {path: _layer(reading) for path, reading in readings.items()}
        self.write(
            SpectrumRecord(epoch=self.trainer.epochs_done, step=self.trainer.done, layers=layers)
        )


def _layer(reading: SpectralReading) -> LayerSpectrum:
    found: dict[str, Any] = {**vars(reading), "values": thinned(reading.values, VALUES)}
    return LayerSpectrum(**found)


def thinned(values: tuple[float, ...], most: int) -> tuple[float, ...]:
    """At most ``most`` of the values, evenly from the first to the last.

    Example:
        >>> thinned((9.0, 7.0, 5.0, 3.0, 1.0), 3)
        (9.0, 5.0, 1.0)
    """
    if len(values) <= most:
        return values
    last = len(values) - 1
    return tuple(values[round(i * last / (most - 1))] for i in range(most))
