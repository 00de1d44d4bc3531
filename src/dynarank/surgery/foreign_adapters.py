"""Layers inside PEFT's adapters, which change form only once they are ours.

PEFT puts a module around each layer it adapts: the layer itself is frozen, and what trains are
matrices beside it. A schedule of ranks would change the frozen one, and train nothing.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from dynarank.layers import RankedLayer
from dynarank.surgery.site import Site

__all__ = ["inside_adapters", "is_adapter", "without_form"]

_LAYER = "BaseTunerLayer"  # by name: PEFT is not imported
_BASE = "it is frozen beneath a PEFT adapter: take it over by dr.from_peft(model)"
_PART = "it is a part of a PEFT adapter"


def inside_adapters(model: nn.Module) -> dict[nn.Module, str]:
    """Why plain modules inside PEFT's adapters are left; those that are ranked already are ours.

    Example:
        >>> inside_adapters(nn.Sequential(nn.Linear(2, 2)))
        {}
    """
    found: dict[nn.Module, str] = {}
    for adapter in model.modules():
        if is_adapter(adapter):
            found.update(dict.fromkeys(adapter.modules(), _PART))
            base = getattr(adapter, "base_layer", None)
            if isinstance(base, nn.Module):
                found.update(dict.fromkeys(base.modules(), _BASE))
    return {m: why for m, why in found.items() if not isinstance(m, RankedLayer)}


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is PEFT's adapter of a layer."""
    return any(kind.__name__ == _LAYER for kind in type(module).__mro__)


def without_form(site: Site, reason: str) -> Site:
    """The site of a module inside an adapter: to name it is an error if it is the adapted layer."""
    refused = reason is _BASE and site.form is not None
    return replace(site, form=None, obstacle=site.obstacle or reason, refused=refused)
