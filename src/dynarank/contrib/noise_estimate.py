"""Unbiased estimates of a gradient's noise and signal, and their averages over time.

Legend: g_i the mean gradient of shard i of N, each of b samples; g their mean, that of B = N b
samples; Sigma the covariance of one sample's gradient, G the true gradient. S estimates tr(Sigma)
and Q estimates |G|^2, without bias (McCandlish et al., arXiv 1812.06162, 2018, appendix A.1)::

    S = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)         = b / (N - 1) * sum_i |g_i - g|^2
    Q = (B |g_B|^2 - b |g_b|^2) / (B - b)         = |g|^2 - S / B

The right-hand sides, for |g_b|^2 the mean over the shards, take no difference of large numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Average", "Estimate", "from_norms", "from_shards", "noise_scale", "squared_norm"]


class Estimate(NamedTuple):
    """S, the noise tr(Sigma) of one sample's gradient, and Q, the signal |G|^2."""

    noise: float
    signal: float

    def plus(self, other: Estimate) -> Estimate:
        """That of both parts of a parameter vector."""
        return Estimate(self.noise + other.noise, self.signal + other.signal)


def from_norms(small: float, large: float, samples: tuple[int, int]) -> Estimate:
    """S and Q from the squared norms of the mean gradients of b and of B samples.

    Example:
        >>> from_norms(3.0, 2.0, (8, 16))
        Estimate(noise=16.0, signal=1.0)
    """
    b, large_b = samples
    noise = (small - large) / (1 / b - 1 / large_b)
    return Estimate(noise, (large_b * large - b * small) / (large_b - b))


@torch.no_grad()
def from_shards(shards: Iterable[Sequence[Tensor | None]], samples: int) -> list[Estimate]:
    """S and Q of each tensor, from the gradients of N shards of ``samples`` each.

    The shards come one at a time; a running mean is kept (Welford 1962). None is a gradient of
    zeros.

    Raises:
        ValueError: fewer than two shards, or no sample in them.

    Example:
        >>> from_shards([[torch.tensor([3.0])], [torch.tensor([1.0])]], samples=1)
        [Estimate(noise=2.0, signal=3.0)]
    """
    if samples < 1:
        raise ValueError(f"a shard has 1 or more samples, got samples={samples}")
    means: list[_Mean] = []
    count = 0
    for count, gradients in enumerate(shards, start=1):
        means = means or [_Mean() for _ in gradients]
        for mean, gradient in zip(means, gradients, strict=True):
            mean.add(gradient, count)
    if count < 2:
        raise ValueError(f"the noise scale needs two or more shards of a batch, got {count}")
    return [mean.estimate(count, samples) for mean in means]


class _Mean:
    """A running mean, and the sum of squared deviations from it."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._deviation: Tensor | float = 0.0

    def add(self, gradient: Tensor | None, count: int) -> None:
        if gradient is None and self._value is None:
            return
        value = torch.zeros_like(self._value) if gradient is None else _plain(gradient)  # type: ignore[arg-type]
        before = torch.zeros_like(value) if self._value is None else self._value
        change = value - before
        self._value = before + change / count
        share = (count - 1) / count
        self._deviation = self._deviation + share * torch.linalg.vector_norm(change).square()

    def estimate(self, count: int, samples: int) -> Estimate:
        if self._value is None:
            return Estimate(0.0, 0.0)
        noise = samples / (count - 1) * float(self._deviation)
        return Estimate(noise, squared_norm(self._value) - noise / (count * samples))


def squared_norm(gradient: Tensor) -> float:
    """|g|^2."""
    return float(torch.linalg.vector_norm(_plain(gradient)).square())


def _plain(gradient: Tensor) -> Tensor:
    dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


class Average:
    """An exponential moving average of estimates, without bias from its start.

    Example:
        >>> average = Average(0.9)
        >>> average.add(Estimate(4.0, 2.0))
        >>> average.value
        Estimate(noise=4.0, signal=2.0)
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum = Estimate(0.0, 0.0)
        self._weight = 0.0

    def add(self, estimate: Estimate) -> None:
        """Take in one more."""
        keep, new = self._decay, 1 - self._decay
        self._sum = Estimate(
            *(keep * a + new * b for a, b in zip(self._sum, estimate, strict=True))
        )
        self._weight = keep * self._weight + new

    @property
    def value(self) -> Estimate:
        """The average."""
        return Estimate(self._sum.noise / self._weight, self._sum.signal / self._weight)


def noise_scale(estimates: Iterable[Estimate]) -> float:
    """``sum S / sum Q``, in samples; infinite while the signal is lost in the noise.

    Example:
        >>> noise_scale([Estimate(4.0, 2.0), Estimate(2.0, 1.0)])
        2.0
    """
    total = Estimate(0.0, 0.0)
    for estimate in estimates:
        total = total.plus(estimate)
    if total.signal > 0:
        return max(total.noise, 0.0) / total.signal
    return math.inf if total.noise > 0 else math.nan
