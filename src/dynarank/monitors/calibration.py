"""Activation statistics of each weight over a few batches, for activation-aware truncation.

Legend: y = W x what a weight gives without the bias, E[y y'] its second moment over the batches.

The model is run in evaluation mode and left as it was. :mod:`dynarank.decompositions.truncation`
truncates a weight by these statistics so that its outputs change least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynarank.decompositions import UnfitWeightError
from dynarank.decompositions.truncation import ActivationStats
from dynarank.layers import own_parameters
from dynarank.layers.running import call_model, preserve_state
from dynarank.surgery.selection import LayerFilter, select
from dynarank.surgery.sites import Site, survey

__all__ = ["Calibration", "calibrate"]

_CHUNK = 1 << 22  # entries multiplied at once: 16 MiB of fp32, beside the model's own activations
_PRECISE_UP_TO = 1024  # larger second moments are summed in fp32: 8 MiB each in fp64


class Calibration(dict[str, ActivationStats]):
    """The activation statistics of a model's weights, by their paths.

    Args:
        activities: the statistics.
        missed: the paths without statistics, and why: they are truncated by the weight alone.
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

    For linear layers, all convolutions and embeddings. Weights that a module multiplies by inside
    (attention's in-projection, recurrent layers) are listed as missed. Parameters,
    gradients, buffers, training mode and random state are left as they were.

    Calibrate right before the change: the outputs are those of today's weights. In a data-parallel
    run give every process the same batches, or they will truncate differently.

    Args:
        model: any model; its layers may have any form.
        batches: of the size it trains on, such as a ``DataLoader``; a few hundred samples are many
            for a small model. Each is a tensor, a tuple or list of positional arguments of the
            forward pass, of which targets at the end are left out (see
            :func:`dynarank.layers.running.forward_arguments`), or a dict of keyword arguments.
        layers: a filter ``(module, path) -> bool`` or glob patterns; None: every weight.
        forward: how to run a batch, ``(model, batch) -> anything``, if the model needs more.

    Raises:
        ValueError: no batch; no weight was met.
        UnfitWeightError: outputs that are not finite; the message names the first such layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> calibration = calibrate(model, [torch.randn(32, 8)])
        >>> calibration.get("2").second.shape
        torch.Size([1, 2, 2])
    """
    every = survey(model)
    sites = [s for s in every if s.form] if layers is None else select(every, layers)
    missed = {site.path: reason for site in sites if (reason := _beyond_reach(site))}
    meters = {site.path: _Meter(site) for site in sites if site.path not in missed}
    met: list[str] = []
    with preserve_state(model, training=False, grad=False, eager=True), ExitStack() as hooks:
        for path, meter in meters.items():
            for module in meter.modules():
                hook = _hook(meter, path, met)
                handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                hooks.callback(handle.remove)
        _run(model, batches, forward or call_model)
    if not met:
        raise ValueError("the batches met no weight that can change form; is this the model used?")
    activities = {path: meters[path].activity(path) for path in met}
    missed |= {path: "no batch reached it" for path in meters if path not in activities}
    return Calibration(activities, missed)


class _Meter:
    """Sums over the outputs of a weight, or over its inputs if it is tall."""

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
        self.count = 0

    def modules(self) -> Iterator[nn.Module]:
        """Every module that uses the weight."""
        return (one.module for one in self.site.places)

    def add(self, vectors: Tensor, bias: Tensor | None) -> None:
        """Add vectors (..., k, *positions), without the bias."""
        groups = self.spec.geometry.groups
        axis = vectors.ndim - 1 - self.spec.dims
        flat = vectors.movedim(axis, 0).flatten(1)  # (groups * k, N)
        width = torch.float64 if vectors.dtype == torch.float64 else torch.float32
        for part in flat.split(max(1, _CHUNK // flat.shape[0]), 1):
            part = part.to(width) if bias is None else part.to(width) - bias.to(width)[:, None]
            grouped = part.unflatten(0, (groups, -1))
            self._sum(grouped @ grouped.mT, grouped.sum(-1))
        self.count += flat.shape[1]

    def _sum(self, product: Tensor, vectors: Tensor) -> None:
        if self.second is None or self.sum is None:
            small = product.shape[-1] <= _PRECISE_UP_TO and product.device.type != "mps"
            dtype = torch.float64 if small else None
            self.second = torch.zeros_like(product, dtype=dtype)
            self.sum = torch.zeros_like(vectors, dtype=dtype)
        self.second += product
        self.sum += vectors

    def activity(self, path: str) -> ActivationStats:
        assert self.second is not None and self.sum is not None
        if not torch.isfinite(self.second).all():
            raise UnfitWeightError(
                f"layer {path!r}: its {self.side}s on the calibration batches are not finite, or "
                "too large to be squared; look at the batches and at the layers before it"
            )
        count = max(self.count, 1)
        second, mean = self.second / count, self.sum / count
        if not self.centered:
            return ActivationStats(self.side, second, self.count)
        return ActivationStats(
            self.side, second - mean[:, :, None] * mean[:, None], self.count, mean
        )


def _hook(meter: _Meter, path: str, met: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, named: Mapping[str, Any], output: Any) -> None:
        if path not in met:
            met.append(path)
        if meter.side == "input":
            meter.add(inputs[0] if inputs else next(iter(named.values())), None)
        else:
            meter.add(output, own_parameters(module).get("bias"))

    return hook


def _beyond_reach(site: Site) -> str:
    """Why a weight's outputs cannot be seen from outside its module; empty if they can."""
    if site.spec.name != "weight":
        return f"{type(site.module).__name__} multiplies by it inside"
    if any(one.spec.lookup != site.spec.lookup for one in site.tied):
        return "its rows are looked up in one place and it is multiplied by in another"
    return ""


def _run(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object]
) -> None:
    empty = True
    for batch in batches:
        forward(model, batch)
        empty = False
    if empty:
        raise ValueError("there is no batch to calibrate on; give a few, as the model trains on")
