"""Readings over time. A monitor only reads: with and without it a run is the same, bit by bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from dynarank.forms import RankLike
from dynarank.monitors.cadence import Cadence
from dynarank.monitors.effective_weight import LayerWeight
from dynarank.monitors.singular_values import singular_values
from dynarank.monitors.spectral_reading import read_spectra
from dynarank.schedules.readings import SpectralReading
from dynarank.surgery.selection import LayerFilter, select
from dynarank.surgery.sites import Site, survey

__all__ = ["SpectralMonitor"]


class SpectralMonitor:
    """Reads lambda, effective, stable and energy rank of a model's layers.

    ``read`` reads now, by no clock and no random number: equal weights give equal readings.
    ``step``, called once for each step of the optimizer, reads now and then: by default such that
    readings take less than ``share`` of the time.

    With ``updates`` the rank of the accumulated update is read too, the effective rank of
    ``W_now - W_start`` with ``W_start`` the weight when the monitor was made. It is the effective
    weight that counts, so that a truncation is an update and a lossless change of form is none. The
    parameters of each watched layer are kept for it in main memory, in their dtype and form: a copy
    of the weight (4 n m bytes in fp32), or of the factors where it is low-rank (4 r (n + m)).

    Args:
        model: the model to watch; it is never changed.
        rank: where lambda is taken. None: at the rank each layer has, or last had; 0.5 of the
            output channels for layers that never had factors.
        layers: which layers to watch, a filter or glob patterns; None: the ranked layers, or, if
            there is none, every layer that can change form.
        every: steps from one reading of ``step`` to the next; None: as ``share`` allows.
        share: the most that readings may take of the time since the first step.
        updates: whether to read the rank of the accumulated update.
        values: how many singular values to keep in a reading, evenly from the first to the last.
        clock: gives the time in seconds.

    Raises:
        ValueError: ``every`` is below 1, ``share`` is not in (0, 1], or ``values`` below 0.

    Example:
        >>> monitor = SpectralMonitor(nn.Sequential(nn.Linear(8, 8)), every=2, updates=True)
        >>> [monitor.step() is not None for _ in range(4)]
        [False, True, False, True]
        >>> monitor.read()["0"].update_rank
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: RankLike | None = None,
        layers: LayerFilter = None,
        every: int | None = None,
        share: float = 0.01,
        updates: bool = False,
        values: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if values < 0:
            raise ValueError(f"a reading keeps 0 or more singular values, got values={values}")
        self._model = model
        self._rank = rank
        self._layers = layers
        self._values = values
        self._pace = Cadence(every, share, clock)
        starts = {s.path: LayerWeight.of(s) for s in self._watched()} if updates else {}
        self._starts = {path: weight.kept() for path, weight in starts.items() if weight.finite}

    @property
    def nbytes(self) -> int:
        """The bytes of main memory that the weights kept for ``updates`` take."""
        return sum(start.nbytes for start in self._starts.values())

    def step(self) -> Mapping[str, SpectralReading] | None:
        """Count a step of the optimizer; a reading if one is due after it, else None."""
        return self._pace.step(self.read, self._guess)

    def _guess(self) -> float:
        """Seconds that a first reading may take, from the time that a small one takes."""
        small = torch.eye(_SMALL)
        began = self._pace.clock()
        singular_values(small)
        rate = (self._pace.clock() - began) / _work((_SMALL, _SMALL))
        least = _work((_SMALL // 2, _SMALL // 2))  # smaller ones cost hardly less
        work = sum(max(_work(site.shape), least) for site in self._watched())
        return rate * work * (3 if self._starts else 1)  # updates often need fp64

    def read(self) -> Mapping[str, SpectralReading]:
        """One reading for each watched layer; a layer that is not finite is left out."""
        sites = self._watched()
        return read_spectra(sites, rank=self._rank, values=self._values, starts=self._starts)

    def _watched(self) -> list[Site]:
        sites = survey(self._model)
        if self._layers is not None:
            return select(sites, self._layers)
        able = [s for s in sites if s.form is not None and not s.spec.lookup]
        ranked = [site for site in able if site.last_factored_form is not None]
        return ranked or able


_SMALL = 256  # the side of the matrix that is timed to guess the cost of larger ones


def _work(shape: tuple[int, ...]) -> float:
    """The cost of a reading, up to a factor: n^3 for a spectrum, n^2 m / 5 for a Gram matrix."""
    n, m = sorted((shape[0], math.prod(shape[1:])))
    return n**2 * (n + m / 5)
