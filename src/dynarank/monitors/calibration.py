"""Activation statistics of each weight over a few batches, for activation-aware truncation.

Legend: y = W x the output of a weight without the bias, E[y y'] its second moment over the batches.

The model runs in evaluation mode, and its state is restored. With these statistics,
:mod:`dynarank.decompositions.truncation` truncates a weight so that its outputs change least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynarank.decompositions import UnfitWeightError, all_finite
from dynarank.decompositions.truncation import ActivationStats
from dynarank.distributed.unwrap import unwrapped
from dynarank.layers import own_parameters
from dynarank.layers.running import call_model, preserve_state
from dynarank.surgery.selection import LayerFilter, select
from dynarank.surgery.sites import Site, survey

__all__ = ["Calibration", "calibrate"]

_CHUNK = 1 << 22  # entries multiplied at once: 16 MiB of fp32, besides the model's activations
_PRECISE_UP_TO = 1024  # larger second moments are summed in fp32: 8 MiB each in fp64


class Calibration(dict[str, ActivationStats]):
    """The activation statistics of a model's weights, by their paths.

    Args:
        activities: the statistics, by path.
        missed: the reasons why weights have no statistics, by path. They are truncated without
            statistics.
    """

    def __init__(
        self, activities: Mapping[str, ActivationStats], missed: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(activities)
        self.missed = dict(missed or {})


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: LayerFilter = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> Calibration:
    """Run a few batches through the model and measure ``E[y y']`` for each weight.

    Supports linear layers, all convolutions and embeddings. Weights that are multiplied inside
    their module (the in-projection of attention, recurrent layers) are listed as missed.
    Parameters, gradients, buffers, training mode and random state are unchanged.

    Calibrate right before the change, since the statistics are those of the current weights. In a
    data-parallel run, pass the same batches in every process, or they will truncate differently.

    Args:
        model: any model; its layers may have any form.
        batches: batches of the usual training size, such as a ``DataLoader`` yields; a few hundred
            samples are plenty for a small model. Each is a tensor, a tuple or list of positional
            arguments of the forward pass, from which trailing targets are dropped (see
            :func:`dynarank.layers.running.forward_arguments`), or a dict of keyword arguments.
        layers: a filter ``(module, path) -> bool`` or glob patterns; None: every weight.
        forward: a function ``(model, batch) -> anything`` that runs a batch, if a plain call of the
            model is not enough.

    Raises:
        ValueError: no batches, or no weight was used in the forward pass and none is missed.
        UnfitWeightError: outputs that are not finite; the message names the first such layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> calibration = calibrate(model, [torch.randn(32, 8)])
        >>> calibration.get("2").second.shape
        torch.Size([1, 2, 2])
    """
    model = unwrapped(model)
    every = survey(model)
    sites = [s for s in every if s.form] if layers is None else select(every, layers)
    missed = {site.path: reason for site in sites if (reason := _beyond_reach(site))}
    meters = {site.path: _Meter(site) for site in sites if site.path not in missed}
    met: list[str] = []
    with preserve_state(model, training=False, grad=False, eager=True), ExitStack() as hooks:
        for path, meter in meters.items():
            for module in meter.modules():
                hook = _hook(meter, path, met)
                hooks.callback(_remove, hook, module)  # first: no interrupt leaves the hook behind
                module.register_forward_hook(hook, prepend=True, with_kwargs=True)
        _run(model, batches, forward or call_model)
    if not met and not missed:
        raise ValueError(
            "the batches used no weight that can change form; is this the model that is trained?"
        )
    activities = {path: meters[path].activity(path) for path in met}
    missed |= {path: "no batch reached it" for path in meters if path not in activities}
    return Calibration(activities, missed)


class _Meter:
    """Accumulates moments of a weight's outputs, or of its inputs if it is tall."""

    def __init__(self, site: Site) -> None:
        self.site, self.spec = site, site.spec
        n, m = self.spec.unit_shape[0], torch.Size(self.spec.shape[1:]).numel()
        tall = self.spec.dims == 0 and n > m
        self.side: Literal["output", "input", "row"] = (
            "row" if self.spec.lookup else "input" if tall else "output"
        )
        self.centered = own_parameters(site.module).get("bias") is not None and not site.tied
        self.second: Tensor | None = None
        self.sum: Tensor | None = None
        self.origin: Tensor | None = None  # near the mean, whose square may be far above the rest
        self.recent: Tensor | None = None  # products summed in fp32, of at most _CHUNK entries
        self.left = 0  # the number of vectors that they can still take
        self.count = 0

    def modules(self) -> Iterator[nn.Module]:
        """All modules that use the weight."""
        return (one.module for one in self.site.places)

    def add(self, vectors: Tensor, bias: Tensor | None) -> None:
        """Add vectors (..., k, *positions), after subtracting the bias."""
        groups = self.spec.geometry.groups
        axis = vectors.ndim - 1 - self.spec.dims
        flat = vectors.movedim(axis, 0).flatten(1)  # (groups * k, N)
        most = max(1, _CHUNK // flat.shape[0])
        for part in flat.split(most, 1) if flat.shape[1] else ():
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            part = part if bias is None else part - bias.to(part.dtype)[:, None]
            if self.centered:
                self.origin = part.mean(1, keepdim=True) if self.origin is None else self.origin
                part = part - self.origin
            self._sum(part.unflatten(0, (groups, -1)), most)
        self.count += flat.shape[1]

    def _sum(self, vectors: Tensor, most: int) -> None:
        """Add vectors (groups, k, N); their products are summed in fp64 every ``most`` vectors."""
        number = vectors.shape[-1]
        if self.sum is None:
            self.sum = torch.zeros_like(vectors[..., 0], dtype=self._wide(vectors))
        self.sum += vectors.sum(-1)
        if self.recent is not None and number > self.left:
            self._settle()
        if self.recent is None:
            self.recent, self.left = vectors @ vectors.mT, most
        else:
            self.recent.baddbmm_(vectors, vectors.mT)
        self.left -= number

    def _settle(self) -> None:
        """Add the recent products to those before."""
        if self.recent is not None:
            recent = self.recent.to(self._wide(self.recent))
            self.second = recent if self.second is None else self.second.add_(recent)
            self.recent = None

    def _wide(self, like: Tensor) -> torch.dtype:
        small = like.shape[1] <= _PRECISE_UP_TO and like.device.type != "mps"
        return torch.float64 if small else like.dtype

    def activity(self, path: str) -> ActivationStats:
        self._settle()
        assert self.second is not None and self.sum is not None
        if not all_finite(self.second):
            raise UnfitWeightError(
                f"layer {path!r}: its {self.side}s on the calibration batches are not finite, or "
                "too large to be squared; check the batches and the layers before it"
            )
        count = max(self.count, 1)
        second, mean = self.second / count, self.sum / count
        if not self.centered:
            return ActivationStats(self.side, second, self.count)
        second.baddbmm_(mean[:, :, None], mean[:, None], alpha=-1)
        mean = mean if self.origin is None else mean + self.origin.view_as(mean)
        return ActivationStats(self.side, second, self.count, mean)


def _hook(meter: _Meter, path: str, met: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, named: Mapping[str, Any], output: Any) -> None:
        if path not in met:
            met.append(path)
        if meter.side == "input":
            meter.add(inputs[0] if inputs else next(iter(named.values())), None)
        else:
            bias = getattr(module, "bias", None)  # a tensor that is computed too, as by prune
            meter.add(output, bias if isinstance(bias, Tensor) else None)

    return hook


def _remove(hook: Callable[..., None], module: nn.Module) -> None:
    """Take a forward hook off a module, if it is there."""
    table, with_named = module._forward_hooks, module._forward_hooks_with_kwargs  # pyright: ignore[reportPrivateUsage]
    for key, one in list(table.items()):
        if one is hook:
            del table[key]
            with_named.pop(key, None)


def _beyond_reach(site: Site) -> str:
    """The reason why hooks cannot see a weight's outputs; empty if they can."""
    if site.spec.name != "weight":
        return f"{type(site.module).__name__} multiplies by it internally"
    if any(one.spec.lookup != site.spec.lookup for one in site.tied):
        return "its rows are looked up in one module, and another module multiplies by it"
    return ""


def _run(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object]
) -> None:
    empty = True
    for batch in batches:
        forward(model, batch)
        empty = False
    if empty:
        raise ValueError("there is no batch to calibrate on; pass a few training batches")
