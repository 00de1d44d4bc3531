"""The gradient noise scale: how many samples a batch needs before its gradient is more than noise.

Experimental: the estimate is coarse, and no schedule of this library decides by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.contrib.noise_estimate import (
    Average,
    Estimate,
    from_norms,
    from_shards,
    noise_scale,
    squared_norm,
)
from dynarank.layers.running import preserve_state
from dynarank.monitors.cadence import Cadence
from dynarank.schedules.readings import NoiseReading
from dynarank.surgery.sites import survey

__all__ = ["NoiseMonitor"]

_Part = TypeVar("_Part")
_REST = ""  # what is no layer's weight: biases, normalizations
_Layout: TypeAlias = tuple[tuple[int, ...], ...]  # the shapes of a layer's trained parameters


class NoiseMonitor:
    """Reads the gradient noise scale, tr(Sigma) / |G|^2, in samples: per layer and of the model.

    Sigma is the covariance of one sample's gradient and G the true gradient. Unbiased estimates of
    numerator and denominator (``noise_estimate``) are averaged over readings, each on
    its own, and only then divided; the model's are the sums of its parts'. A layer's noise is that
    of the parameters which train in its form, weight or factors, so that a change of form starts
    its averages anew.

    Gradients come from one of three places:

    - :meth:`measure` and :meth:`step` compute them, on two or more parts of a batch, at the cost of
      one more forward and backward pass of it. ``.grad``, buffers and random state stay as they
      are; two copies of the trainable parameters' size are alive meanwhile.
    - :meth:`feed` takes gradients that one has already, of data-parallel shards or micro-batches.
    - :meth:`norms` and :meth:`feed_norms` do with squared norms of ``.grad``: after the first
      micro-batch and after the last, or before and after the shards' mean.

    Args:
        model: the model; inside its data-parallel wrapper, if it has one.
        every: steps from one reading of ``step`` to the next; None: as ``share`` allows.
        share: the most that readings of ``step`` may take of the time since the first step.
        decay: of the averages, from one reading to the next.
        clock: gives the time in seconds.

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
        """Count a step of the optimizer; :meth:`measure` if that is due after it, else None.

        Args:
            loss: gives the mean loss of a part.
            parts: gives the parts of a batch: asked only when they are needed.
            samples: in each part.
        """
        # Two halves cost about one step, and one step has passed when a guess is asked for.
        guess = self._pace.elapsed
        return self._pace.step(lambda: self.measure(loss, parts(), samples), guess)

    def measure(
        self, loss: Callable[[_Part], Tensor], parts: Iterable[_Part], samples: int
    ) -> NoiseReading:
        """Compute the gradient of each part and read the noise scale; nothing else changes.

        Forward hooks run, and what they or a module write elsewhere than in buffers is not undone.

        Args:
            loss: gives the mean loss of a part, as in training.
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
        """Read the noise scale from gradients that one has.

        Args:
            shards: of each shard, the gradient of its mean loss, by the parameters' names; they may
                come one at a time.
            samples: in each shard.

        Raises:
            ValueError: fewer than two shards, or a name that the model does not have.
        """
        named = dict(self._model.named_parameters())

        def gradients() -> Iterator[Sequence[Tensor | None]]:
            for shard in shards:
                if unknown := sorted(shard.keys() - named.keys()):
                    raise ValueError(f"the model has no parameter {unknown[0]!r}")
                yield [shard.get(name) for name in named]

        return self._read(list(named.values()), from_shards(gradients(), samples))

    def norms(self, scale: float = 1.0) -> dict[str, float]:
        """Squared norms of ``scale * .grad`` by layer; under ``""`` what is no layer's weight.

        ``scale`` makes a mean of an accumulated sum.
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
        """Read the noise scale from squared norms of gradients, as :meth:`norms` gives them.

        Args:
            small: of a smaller batch's mean gradient; of several such, the mean of their norms.
            large: of a larger batch's, which may contain the smaller.
            samples: in the smaller and in the larger.

        Raises:
            ValueError: the larger batch is not larger, or the layers differ.
        """
        if not 0 < samples[0] < samples[1]:
            raise ValueError(f"the second batch must be the larger, got {samples} samples")
        if differing := sorted(small.keys() ^ large.keys()):
            raise ValueError(f"norms of {differing[0]!r} were given of one batch only")
        return self._average({p: from_norms(small[p], large[p], samples) for p in small})

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
        """The layer of each parameter that is part of a layer's weight and not its frozen base."""
        sites = [site for site in survey(self._model) if site.form is not None]
        return {p: site.path for site in sites for p in site.trained()}
