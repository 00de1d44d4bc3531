"""The spectral monitor, which reads rank metrics during a run without changing it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dynarank.forms import RankLike
from dynarank.monitors.cadence import Cadence
from dynarank.monitors.effective_weight import LayerWeight
from dynarank.monitors.singular_values import singular_values
from dynarank.monitors.spectral_reading import read_spectra
from dynarank.schedules.readings import SpectralReading
from dynarank.surgery.selection import LayerFilter, find_sites, select
from dynarank.surgery.sites import Site, survey

__all__ = ["SpectralMonitor"]


class SpectralMonitor:
    """Reads the rank metrics of a model's layers: lambda, effective, stable and energy rank.

    :meth:`read` computes a reading now. It is deterministic: equal weights give equal readings.
    :meth:`step` is called once per optimizer step and reads from time to time, by default so that
    readings take less than ``share`` of the time. Training is bit-for-bit the same with and without
    the monitor.

    With ``updates``, the rank of the accumulated update is read too: the effective rank of
    ``W_now - W_start``, where ``W_start`` is the weight when the monitor was created. Effective
    weights are compared, so that a truncation counts as an update and a lossless change of form
    does not. For this a copy of the parameters of each watched layer is kept in main memory, in
    their dtype and form: the weight (4 n m bytes in fp32), or the factors of a low-rank layer
    (4 r (n + m)).

    Args:
        model: the model to watch; it is never modified.
        rank: the rank at which lambda is computed. None: the rank that each layer has, or last had;
            0.5 of the output channels for layers that never had factors.
        layers: which layers to watch, a filter or glob patterns; None: the ranked layers, or, if
            there are none, every layer that can change form.
        every: the number of steps between readings of ``step``; None: as often as ``share`` allows.
        share: the largest share of the time since the first step that readings may take.
        updates: whether to read the rank of the accumulated update.
        values: how many singular values to keep in a reading, evenly spaced from first to last.
        clock: a function that returns the time in seconds.

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
        watched = self._watched()  # now, so that a pattern without a layer is refused at once
        starts = {s.path: LayerWeight.of(s) for s in watched} if updates else {}
        self._starts = {path: weight.kept() for path, weight in starts.items() if weight.finite}

    @property
    def nbytes(self) -> int:
        """The main memory that the weights kept for ``updates`` take, in bytes."""
        return sum(start.nbytes for start in self._starts.values())

    def step(self) -> Mapping[str, SpectralReading] | None:
        """Count an optimizer step; return a reading if one is due after it, else None."""
        return self._pace.step(self.read, self._guess)

    def state_dict(self) -> dict[str, Any]:
        """The steps counted, and the weights that updates are measured from."""
        return {
            "cadence": self._pace.state_dict(),
            "starts": {path: start.state_dict() for path, start in self._starts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the monitor whose state it is: updates are those since its creation.

        Raises:
            ValueError: it is the state of a monitor of another model. Nothing has changed then.
        """
        sites = find_sites(self._model, survey(self._model), state["starts"])
        starts = {p: LayerWeight.saved(s.spec, state["starts"][p]) for p, s in sites.items()}
        self._pace.load_state_dict(state["cadence"])
        self._starts = starts

    def _guess(self) -> float:
        """The expected duration of the first reading in seconds, from the time of a small one."""
        small = torch.eye(_SMALL, device="cpu")
        began = self._pace.clock()
        singular_values(small)
        rate = (self._pace.clock() - began) / _work((_SMALL, _SMALL))
        least = _work((_SMALL // 2, _SMALL // 2))  # smaller matrices take about as long
        work = sum(max(_work(site.shape), least) for site in self._watched())
        return rate * work * (3 if self._starts else 1)  # updates often need fp64

    def read(self) -> Mapping[str, SpectralReading]:
        """A reading for each watched layer, except for layers that are not finite."""
        sites = self._watched()
        return read_spectra(sites, rank=self._rank, values=self._values, starts=self._starts)

    def _watched(self) -> list[Site]:
        sites = survey(self._model)
        if self._layers is not None:
            return select(sites, self._layers)
        able = [s for s in sites if s.form is not None and not s.spec.lookup]
        ranked = [site for site in able if site.last_factored_form is not None]
        return ranked or able


_SMALL = 256  # the side of the matrix that is timed to estimate the cost of larger ones


def _work(shape: tuple[int, ...]) -> float:
    """The cost of a reading, up to a factor: n^3 for a spectrum, n^2 m / 5 for a Gram matrix."""
    n, m = sorted((shape[0], math.prod(shape[1:])))
    return n**2 * (n + m / 5)
