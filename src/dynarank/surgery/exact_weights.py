"""Exact values of weights that a load truncated, until the next optimizer step.

A full-rank checkpoint loaded into a low-rank layer is truncated to its rank, since nothing in the
file says that the layer is to be full-rank. If the rank scheduler's state is loaded next and does
say so, the exact value is still here.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.layers import own_parameters
from dynarank.surgery.optimizer_steps import trains, unwatch_steps, watch_steps
from dynarank.surgery.site import Site

__all__ = ["forget", "keep", "kept"]

_KEPT: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def keep(site: Site, weight: Tensor) -> None:
    """Remember a weight, as the module stores it, until an optimizer steps with its layer."""
    for place in site.places:
        _KEPT.setdefault(place.module, {})[place.spec.name] = weight
    watch_steps(_trained)


def kept(site: Site) -> Tensor | None:
    """The exact value of the weight, if a load has truncated it and it has not trained since."""
    return _KEPT.get(site.module, {}).get(site.spec.name)


def forget(module: nn.Module) -> None:
    """Drop what is kept of a module's weights."""
    _KEPT.pop(module, None)
    if not _KEPT:
        unwatch_steps(_trained)


def _trained(optimizer: Optimizer) -> None:
    if not trains(optimizer):
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in list(_KEPT):
        if any(id(p) in held for p in own_parameters(module).values()):
            forget(module)
