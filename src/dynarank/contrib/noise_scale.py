"""The gradient noise scale: the batch size at which gradient and noise are equally large.

Experimental: the estimate is coarse, and no schedule of this library uses it.

Legend: g_i the mean gradient of shard i of N, each of b samples; g their mean, that of B = N b
samples; Sigma the covariance of one sample's gradient, G the true gradient. S estimates tr(Sigma)
and Q estimates |G|^2, without bias (McCandlish et al., arXiv 1812.06162, 2018, appendix A.1)::

    S = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)         = b / (N - 1) * sum_i |g_i - g|^2
    Q = (B |g_B|^2 - b |g_b|^2) / (B - b)         = |g|^2 - S / B

The right-hand sides, with |g_b|^2 the mean over the shards, avoid differences of large numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.layers.running import preserve_state
from dynarank.monitors.cadence import Cadence
from dynarank.surgery.sites import survey

__all__ = [
    "Average",
    "Estimate",
    "NoiseMonitor",
    "NoiseReading",
    "from_norms",
    "from_shards",
    "noise_scale",
    "squared_norm",
]

_Part = TypeVar("_Part")
_REST = ""  # parameters that are no layer's weight: biases, normalizations
_Layout: TypeAlias = tuple[tuple[int, ...], ...]  # the shapes of a layer's trained parameters


@dataclass(frozen=True)
class NoiseReading:
    """One reading of the gradient noise scale, tr(covariance) / |gradient|^2, in samples.

    It is infinite while noise drowns the gradient.

    Args:
        noise_scale: of the whole model.
        layers: of each layer's weight.
    """

    noise_scale: float
    layers: Mapping[str, float]


class NoiseMonitor:
    """Measures the gradient noise scale, tr(Sigma) / |G|^2, in samples: per layer and in total.

    Sigma is the covariance of one sample's gradient and G the true gradient. Unbiased estimates of
    numerator and denominator (:class:`Estimate`) are averaged over readings separately, and only
    then divided; the model's are the sums over its parts. A layer's noise is that of the parameters
    that train in its form, weight or factors, so a change of form restarts its averages.

    Gradients come from one of three sources:

    - :meth:`measure` and :meth:`step` compute them on two or more parts of a batch, at the cost of
      one more forward and backward pass. ``.grad``, buffers and random state do not change; it
      takes temporary memory for two copies of the trainable parameters.
    - :meth:`feed` takes existing gradients, of data-parallel shards or micro-batches.
    - :meth:`norms` and :meth:`feed_norms` only need squared norms of ``.grad``: after the first
      micro-batch and after the last, or before and after averaging shards.

    Args:
        model: the model; the module inside a data-parallel wrapper, if there is one.
        every: steps between readings of ``step``; None: as often as ``share`` allows.
        share: the largest share of the time since the first step that readings may take.
        decay: of the averages, per reading.
        clock: returns the time in seconds.

    Raises:
        ValueError: ``every`` is below 1, ``share`` not in (0, 1], or ``decay`` not in [0, 1).

    Example:
        >>> from dynarank.contrib.noise_scale import NoiseMonitor
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> halves = torch.randn(32, 4).split(16)
        >>> noise = NoiseMonitor(model)
        >>> reading = noise.measure(lambda x: model(x).square().mean(), halves, samples=16)
        >>> list(reading.layers), model[0].weight.grad
        (['0'], None)

    Reference: McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162,
    2018.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int | None = None,
        share: float = 0.01,
        decay: float = 0.95,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an average lies in [0, 1), got {decay!r}")
        self._model, self._decay = model, decay
        self._pace = Cadence(every, share, clock)
        self._averages: dict[str, tuple[_Layout, Average]] = {}

    def step(
        self, loss: Callable[[_Part], Tensor], parts: Callable[[], Iterable[_Part]], samples: int
    ) -> NoiseReading | None:
        """Count an optimizer step, and :meth:`measure` if a reading is due; otherwise None.

        Args:
            loss: returns the mean loss of a part.
            parts: returns the parts of a batch; called only for a reading.
            samples: in each part.
        """
        # Two halves cost about one step, so the time of the first step is the first guess.
        guess = self._pace.elapsed
        return self._pace.step(lambda: self.measure(loss, parts(), samples), guess)

    def measure(
        self, loss: Callable[[_Part], Tensor], parts: Iterable[_Part], samples: int
    ) -> NoiseReading:
        """Compute the gradient of each part and the noise scale; nothing else changes.

        Forward hooks run, and what they or a module write outside of buffers is not undone.

        Args:
            loss: returns the mean loss of a part, as in training.
            parts: two or more parts of a batch, of equal size.
            samples: in each part.

        Raises:
            ValueError: fewer than two parts.
        """
        parameters = [p for p in self._model.parameters() if p.requires_grad]

        def gradients() -> Iterator[Sequence[Tensor | None]]:
            for part in parts:
                with torch.enable_grad():  # whoever takes the gradients needs none of its own
                    yield torch.autograd.grad(loss(part), parameters, allow_unused=True)

        with preserve_state(self._model):
            return self._read(parameters, from_shards(gradients(), samples))

    def feed(self, shards: Iterable[Mapping[str, Tensor]], samples: int) -> NoiseReading:
        """Compute the noise scale from existing gradients.

        Args:
            shards: for each shard the gradients of its mean loss, by parameter name; may be a
                generator.
            samples: in each shard.

        Raises:
            ValueError: fewer than two shards, or an unknown parameter name.
        """
        named = dict(self._model.named_parameters())

        def gradients() -> Iterator[Sequence[Tensor | None]]:
            for shard in shards:
                if unknown := sorted(shard.keys() - named.keys()):
                    raise ValueError(f"the model has no parameter {unknown[0]!r}")
                yield [shard.get(name) for name in named]

        return self._read(list(named.values()), from_shards(gradients(), samples))

    def norms(self, scale: float = 1.0) -> dict[str, float]:
        """Squared norms of ``scale * .grad`` by layer; ``""`` is everything else.

        ``scale`` turns an accumulated sum into a mean.
        """
        found: dict[str, float] = {}
        layers = self._layers()
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                path = layers.get(parameter, _REST)
                found[path] = found.get(path, 0.0) + scale**2 * squared_norm(parameter.grad)
        return found

    def feed_norms(
        self, small: Mapping[str, float], large: Mapping[str, float], samples: tuple[int, int]
    ) -> NoiseReading:
        """Compute the noise scale from squared gradient norms, as returned by :meth:`norms`.

        Args:
            small: of a smaller batch's mean gradient; for several batches, the mean of the norms.
            large: of a larger batch's mean gradient, which may contain the smaller batch.
            samples: the sizes of the smaller and the larger batch.

        Raises:
            ValueError: the larger batch is not larger, or the layers differ.
        """
        if not 0 < samples[0] < samples[1]:
            raise ValueError(f"the second batch must be larger, got {samples} samples")
        if differing := sorted(small.keys() ^ large.keys()):
            raise ValueError(f"norms of {differing[0]!r} were given for one batch only")
        return self._average({p: from_norms(small[p], large[p], samples) for p in small})

    def state_dict(self) -> dict[str, Any]:
        """The averages so far, as plain data."""
        return {
            path: {"layout": [list(shape) for shape in layout], **average.state_dict()}
            for path, (layout, average) in self._averages.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the averages of another monitor."""
        self._averages = {}
        for path, saved in state.items():
            average = Average(self._decay)
            average.load_state_dict(saved)
            layout = tuple(tuple(shape) for shape in saved["layout"])
            self._averages[path] = layout, average

    def _read(self, parameters: Sequence[Parameter], estimates: list[Estimate]) -> NoiseReading:
        layers = self._layers()
        found: dict[str, Estimate] = {}
        for parameter, estimate in zip(parameters, estimates, strict=True):
            path = layers.get(parameter, _REST)
            found[path] = found.get(path, Estimate(0.0, 0.0)).plus(estimate)
        return self._average(found)

    def _average(self, estimates: Mapping[str, Estimate]) -> NoiseReading:
        layouts: dict[str, _Layout] = {}
        for parameter, path in self._layers().items():
            layouts[path] = (*layouts.get(path, ()), tuple(parameter.shape))
        before, self._averages = self._averages, {}
        for path, estimate in estimates.items():
            layout, average = before.get(path, (None, None))
            if average is None or layout != layouts.get(path, ()):
                average = Average(self._decay)
            average.add(estimate)
            self._averages[path] = layouts.get(path, ()), average
        averages = {path: average.value for path, (_, average) in self._averages.items()}
        layers = {path: noise_scale([value]) for path, value in averages.items() if path != _REST}
        return NoiseReading(noise_scale(averages.values()), layers)

    def _layers(self) -> dict[Parameter, str]:
        """The layer of each trained parameter of a layer's weight (not of a frozen base)."""
        sites = [site for site in survey(self._model) if site.form is not None]
        return {p: site.path for site in sites for p in site.trained()}


class Estimate(NamedTuple):
    """S, the noise tr(Sigma) of one sample's gradient, and Q, the signal |G|^2."""

    noise: float
    signal: float

    def plus(self, other: Estimate) -> Estimate:
        """The estimate for two parts of a parameter vector together."""
        return Estimate(self.noise + other.noise, self.signal + other.signal)


def from_norms(small: float, large: float, samples: tuple[int, int]) -> Estimate:
    """Compute S and Q from the squared norms of the mean gradients of b and B samples.

    Example:
        >>> from_norms(3.0, 2.0, (8, 16))
        Estimate(noise=16.0, signal=1.0)
    """
    b, large_b = samples
    noise = (small - large) / (1 / b - 1 / large_b)
    return Estimate(noise, (large_b * large - b * small) / (large_b - b))


@torch.no_grad()
def from_shards(shards: Iterable[Sequence[Tensor | None]], samples: int) -> list[Estimate]:
    """Compute S and Q of each tensor from the gradients of N shards of ``samples`` each.

    The shards are consumed one at a time with a running mean (Welford 1962). None counts as a zero
    gradient.

    Raises:
        ValueError: fewer than two shards, or shards without samples.

    Example:
        >>> from_shards([[torch.tensor([3.0])], [torch.tensor([1.0])]], samples=1)
        [Estimate(noise=2.0, signal=3.0)]
    """
    if samples < 1:
        raise ValueError(f"a shard must have at least 1 sample, got samples={samples}")
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
    """A bias-corrected exponential moving average of estimates.

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
        """Add one estimate."""
        keep, new = self._decay, 1 - self._decay
        self._sum = Estimate(
            *(keep * a + new * b for a, b in zip(self._sum, estimate, strict=True))
        )
        self._weight = keep * self._weight + new

    def state_dict(self) -> dict[str, Any]:
        """The weighted sums."""
        return {"sum": list(self._sum), "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these sums."""
        self._sum, self._weight = Estimate(*state["sum"]), state["weight"]

    @property
    def value(self) -> Estimate:
        """The average."""
        return Estimate(self._sum.noise / self._weight, self._sum.signal / self._weight)


def noise_scale(estimates: Iterable[Estimate]) -> float:
    """``sum S / sum Q``, in samples; infinite while noise drowns the signal.

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
