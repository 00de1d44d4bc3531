"""Readings over time. A monitor only reads: with and without it a run is the same, bit by bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from dynarank.decompositions import SVD, Factors, UnfitWeightError, precise
from dynarank.forms import FullRank, LowRank, RankLike, resolve_rank
from dynarank.readings import SpectralReading
from dynarank.selection import LayerFilter, select
from dynarank.spectrum import (
    effective_rank,
    energy_rank,
    product_singular_values,
    singular_values,
    spectral_ratio,
    stable_rank,
)
from dynarank.survey import Site, survey

__all__ = ["SpectralMonitor"]


class SpectralMonitor:
    """Reads lambda, effective and stable rank of a model's layers.

    ``read`` reads now. ``step``, called once for each step of the optimizer, reads now and then:
    by default such that readings take less than ``share`` of the time. When readings are taken then
    depends on the clock, what training does never does.

    Args:
        model: the model to watch; it is never changed.
        rank: where lambda is taken. None: at the rank each layer has, or last had; 0.5 of the
            output channels for layers that never had factors.
        layers: which layers to watch, a filter or glob patterns; None: the ranked layers, or, if
            there is none, every layer that can change form.
        every: steps from one reading of ``step`` to the next; None: as ``share`` allows.
        share: the most that readings may take of the time since the first step.
        clock: gives the time in seconds.

    Raises:
        ValueError: ``every`` is below 1, or ``share`` is not in (0, 1].

    Example:
        >>> monitor = SpectralMonitor(nn.Sequential(nn.Linear(8, 8)), every=2)
        >>> list(monitor.read())
        ['0']
        >>> [monitor.step() is not None for _ in range(4)]
        [False, True, False, True]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: RankLike | None = None,
        layers: LayerFilter = None,
        every: int | None = None,
        share: float = 0.01,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"a monitor reads every 1 or more steps, got every={every}")
        if not 0 < share <= 1:
            raise ValueError(f"the share of time for readings must lie in (0, 1], got {share!r}")
        self._model = model
        self._rank = rank
        self._layers = layers
        self._every = every
        self._steps = 0
        self._budget = _Budget(share, clock)

    def step(self) -> Mapping[str, SpectralReading] | None:
        """Count a step of the optimizer; a reading if one is due after it, else None."""
        self._steps += 1
        if self._every is not None:
            return self.read() if self._steps % self._every == 0 else None
        return self._budget.spend(self.read, self._guess)

    def _guess(self) -> float:
        """Seconds that a first reading may take, from the time that a small one takes."""
        small = torch.eye(_SMALL)
        began = self._budget.clock()
        singular_values(small)
        rate = (self._budget.clock() - began) / _work((_SMALL, _SMALL))
        return rate * sum(_work(site.shape) for site in self._watched())

    @torch.no_grad()
    def read(self) -> Mapping[str, SpectralReading]:
        """One reading for each watched layer; a layer that is not finite is left out."""
        readings: dict[str, SpectralReading] = {}
        for site in self._watched():
            try:
                readings[site.path] = self._read(site)
            except UnfitWeightError:
                continue
        return readings

    def _watched(self) -> list[Site]:
        if self._layers is not None:
            return select(self._model, self._layers)
        able = [s for s in survey(self._model) if s.form is not None and not s.spec.lookup]
        ranked = [site for site in able if site.home is not None]
        return ranked or able

    def _read(self, site: Site) -> SpectralReading:
        values = _site_values(site)
        rank = self._lambda_rank(site, site.shape)
        return SpectralReading(
            effective_rank(values),
            stable_rank(values),
            energy_rank(values),
            spectral_ratio(values, rank),
            rank,
            len(values),
        )

    def _lambda_rank(self, site: Site, shape: tuple[int, ...]) -> int:
        if self._rank is not None or site.home is None:
            return resolve_rank(0.5 if self._rank is None else self._rank, shape)
        limit = min(shape[0], math.prod(shape[1:]))  # below that of some decompositions
        return min(int(site.home.rank), limit)  # type: ignore[arg-type]


class _Budget:
    """Decides when something may be done that shall take no more than a share of the time."""

    def __init__(self, share: float, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._share = share
        self._began: float | None = None
        self._spent = 0.0
        self._cost: float | None = None  # of the next time, as far as one knows

    def spend(self, do: Callable[[], _T], guess: Callable[[], float]) -> _T | None:
        """``do()`` if it can be afforded by now, else None; ``guess`` says its cost at first."""
        now = self.clock()
        if self._began is None:
            self._began = now
            self._cost = guess()
            self._spent = self.clock() - now
            return None
        assert self._cost is not None
        if self._spent + self._cost > self._share * (now - self._began):
            return None
        done = do()
        self._cost = self.clock() - now
        self._spent += self._cost
        return done


_T = TypeVar("_T")
_SMALL = 256  # the side of the matrix that is timed to guess the cost of larger ones


def _work(shape: tuple[int, ...]) -> float:
    """The cost of a reading, up to a factor: n^3 for a spectrum, n^2 m / 5 for a Gram matrix."""
    n, m = sorted((shape[0], math.prod(shape[1:])))
    return n**2 * (n + m / 5)


def _site_values(site: Site) -> Tensor:
    """The singular values of a layer's effective weight; from its factors if it has no base."""
    held = _weight_or_factors(site)
    if isinstance(held, Tensor):
        return singular_values(held)
    down, up = held
    return product_singular_values(down.flatten(1), up.flatten(1))


def _weight_or_factors(site: Site) -> Tensor | Factors:
    """The effective weight of a site, or ``down`` and ``up`` where it is their product.

    Joined in fp64, where rounding cannot raise a low rank.
    """
    assert site.form is not None
    if isinstance(site.form, FullRank):
        return site.effective()
    if isinstance(site.form, LowRank) and isinstance(site.spec.decomposition(site.form), SVD):
        return site.factors()
    precisely = {name: precise(p) for name, p in site.parameters().items()}
    return site.spec.turn(site.spec.effective(site.form, precisely))
