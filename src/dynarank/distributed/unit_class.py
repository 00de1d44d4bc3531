"""The class of a unit: a module that ``fully_shard`` was called on, and so gave a class of its own.

``FSDPLinear`` derives from torch's ``FSDPModule`` and from ``nn.Linear``, the class beneath, which
changes when the layer changes form.
"""

from __future__ import annotations

from typing import cast

from torch import nn

__all__ = ["above", "beneath", "is_unit"]

# The class of a unit, by the class that fully_shard gives units and the one beneath.
_UNITS: dict[tuple[type, type], type] = {}


def is_unit(kind: type) -> bool:
    """Whether ``fully_shard`` was called on modules of this class, and so made it.

    Example:
        >>> is_unit(nn.Linear)
        False
    """
    return any(cls.__name__ == "FSDPModule" for cls in kind.__mro__)  # slow to import


def beneath(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before ``fully_shard``; the class itself if it is no unit's.

    Example:
        >>> beneath(nn.Linear)
        <class 'torch.nn.modules.linear.Linear'>
    """
    names = [cls.__name__ for cls in kind.__mro__]
    return kind.__mro__[names.index("FSDPModule") + 1] if "FSDPModule" in names else kind


def above(unit: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a unit gets when the one beneath becomes ``kind``; ``kind`` if it is none."""
    if not is_unit(unit) or is_unit(kind):
        return kind
    wrapper, plain = unit.__mro__[1], beneath(unit)
    _UNITS.setdefault((wrapper, plain), unit)  # it returns to the very class it had
    if (made := _UNITS.get((wrapper, kind))) is None:
        own = {"__deepcopy__": vars(unit).get("__deepcopy__"), "__module__": kind.__module__}
        name = f"{unit.__name__.removesuffix(plain.__name__)}{kind.__name__}"
        made = _UNITS[wrapper, kind] = type(name, (wrapper, kind), own)
    return cast("type[nn.Module]", made)
