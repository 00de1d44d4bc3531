"""What new parameters take over from the old ones, apart from their values.

Whether they train, their class and attributes, shared memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from dynarank.surgery.site import Site

__all__ = ["attributes", "new_parameters", "predecessors"]


def new_parameters(site: Site, values: Mapping[str, Tensor]) -> dict[str, Parameter]:
    """The parameters of a weight's new form, from their values by name.

    Each takes over the attributes of the old parameter of its name, else of the weight's first that
    has them. A factor that is frozen while others train stays frozen in every form that has it; all
    are frozen if the weight is. A base is always frozen.
    """
    old, trains = site.parameters(), _trains(site, values)
    new: dict[str, Parameter] = {}
    for name, value in values.items():
        sources = predecessors(old, name)
        new[name] = Parameter(value, requires_grad=trains[name])
        new[name].__class__ = type(sources[0])
        vars(new[name]).update(attributes(site.path, sources, new[name]))
        if any(p.device.type == "cpu" and p.is_shared() for p in sources):
            new[name].share_memory_()
    return new


def _trains(site: Site, names: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each of the new parameters trains."""
    now = {n: p.requires_grad for n, p in site.parameters().items() if not site.spec.is_base(n)}
    free = [name for name in names if not site.spec.is_base(name)]
    trains = {name: now.get(name, name not in site.frozen_factors) for name in free}
    if not any(trains.values()) or not any(now.values()):
        trains = dict.fromkeys(free, any(now.values()))
    return {name: trains.get(name, False) for name in names}


def predecessors(old: Mapping[str, Parameter], name: str) -> list[Parameter]:
    """What a new parameter of this name takes over from: the old one of its name, then others."""
    return [*(p for n, p in old.items() if n == name), *(p for n, p in old.items() if n != name)]


def attributes(path: str, sources: list[Parameter], new: Tensor) -> dict[str, Any]:
    """What the old parameters have been given as attributes; of two, the first one's counts.

    A tensor with a value for each entry of the old parameter has none for the new one's.
    """
    kept: dict[str, Any] = {}
    for source in reversed(sources):
        for key, value in vars(source).items():
            each = isinstance(value, Tensor) and value.shape == source.shape
            if each and new.shape != source.shape:
                warnings.warn(
                    f"layer {path!r}: the attribute {key!r} has a value for each entry of a "
                    "parameter that is replaced by others, and is dropped",
                    RuntimeWarning,
                    stacklevel=2,
                )
            elif not key.startswith("_dynamo"):  # what the compiler noted of this very tensor
                kept[key] = value
    return kept
