"""What the readings of one layer say: smoothed ranks, and for how long a threshold has been passed.

Legend: e and t are the effective and the stable rank, smoothed over the readings since the layer's
last change, ``x <- a x + (1 - a) reading``; e* is the largest e since then; r is its low rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynarank.schedules.readings import SpectralReading

__all__ = ["Evidence", "Thresholds"]


@dataclass(frozen=True)
class Thresholds:
    """When a reading counts as evidence for a change.

    Args:
        fall: the effective rank has fallen if ``e < (1 - fall) e*``.
        saturation: it saturates the low rank if ``e > saturation r``.
        settled: the stable rank has settled if ``|t - t_before| < settled t_before``.

    Example:
        >>> Thresholds(0.25, 0.5, 0.5).stricter(2.0)
        Thresholds(fall=0.5, saturation=0.75, settled=0.25)
    """

    fall: float
    saturation: float
    settled: float

    def stricter(self, times: float) -> Thresholds:
        """Thresholds that take so many times the evidence; a fall of 1 or more is never reached."""
        saturation = 1 - (1 - self.saturation) / times
        return Thresholds(self.fall * times, saturation, self.settled / times)


@dataclass(frozen=True)
class Evidence:
    """What is known of a layer since its last change.

    Args:
        effective_rank: e; None before the first reading.
        stable_rank: t.
        stable_rank_before: t one reading earlier.
        best: e*.
        fallen: for how many readings in a row e has been low enough.
        saturated: for how many it has been high enough.
        settled: for how many t has stood still.
    """

    effective_rank: float | None = None
    stable_rank: float | None = None
    stable_rank_before: float | None = None
    best: float | None = None
    fallen: int = 0
    saturated: int = 0
    settled: int = 0

    def with_reading(
        self, reading: SpectralReading, thresholds: Thresholds, smoothing: float
    ) -> Evidence:
        """What is known with one more reading, which must be finite.

        Example:
            >>> reading = SpectralReading(7.9, 4.0, 8, 1.0, rank=8, full_rank=64)
            >>> Evidence().with_reading(reading, Thresholds(0.1, 0.95, 0.002), 0.5).saturated
            1
        """
        assert reading.finite
        e = _smoothed(self.effective_rank, reading.effective_rank, smoothing)
        t = _smoothed(self.stable_rank, reading.stable_rank, smoothing)
        best = e if self.best is None else max(self.best, e)
        before = self.stable_rank
        still = before is not None and abs(t - before) < thresholds.settled * before
        return Evidence(
            e,
            t,
            before,
            best,
            self.fallen + 1 if e < (1 - thresholds.fall) * best else 0,
            self.saturated + 1 if e > thresholds.saturation * reading.rank else 0,
            self.settled + 1 if still else 0,
        )


def _smoothed(before: float | None, now: float, smoothing: float) -> float:
    if before is None:
        return now
    return before + (1 - smoothing) * (now - before)  # so that what stands still stays exactly
