"""Ranked classes of subclasses: those of users' classes that inherit their forward pass.

``class Scaled(nn.Linear)`` with its own ``__init__`` computes what ``nn.Linear`` does, so its
ranked class is made from ``RankedLinear`` and itself. A class that overrides ``forward``, or
anything that a forward pass may use, computes something else: it is left as it is.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar, cast

from torch import nn

from dynarank.layers.ranked import RankedLayer

__all__ = ["defined", "derived_class", "overridden"]

# What any layer runs by, besides what its own class defines; the rest of Module a subclass may
# override.
_RUNS = {"forward", "__call__", "_call_impl", "__getattr__", "__getattribute__", "bias"}
_COPIES = {"__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__slots__"}
# What a subclass may override: construction and display, which a forward pass does not use.
_FREE = {
    "__init__", "reset_parameters", "_reset_parameters", "extra_repr", "__repr__",
    "__getstate__", "__setstate__", "__init_subclass__", "__constants__", "_save_to_state_dict",
    "__module__", "__qualname__", "__doc__", "__annotations__", "__annotate__", "__dict__",
    "__weakref__", "__firstlineno__", "__static_attributes__", "__orig_bases__", "__parameters__",
    "__abstractmethods__", "_abc_impl",
}  # fmt: skip


@cache
def overridden(kind: type[nn.Module], ranked: type[RankedLayer]) -> tuple[str, ...]:
    """What a subclass of ``ranked.plain`` changes of what its forward pass may use.

    Args:
        kind: the subclass.
        ranked: the ranked class of one of its bases. What it defines itself may not be taken.

    Example:
        >>> from dynarank.layers.linear import RankedLinear
        >>> class Doubled(nn.Linear):
        ...     def forward(self, input):
        ...         return 2 * super().forward(input)
        >>> overridden(Doubled, RankedLinear)
        ('forward',)
    """
    plain = ranked.plain
    below = (c for c in (Derived, *ranked.__mro__) if c not in nn.Module.__mro__)
    names = (_RUNS | _COPIES | defined(below)) - _FREE
    if _attribute(ranked, "reset_parameters") is not _attribute(plain, "reset_parameters"):
        names.add("reset_parameters")  # the ranked class's would be called instead
    changed = (n for n in names if _attribute(kind, n) is not _attribute(plain, n))
    return tuple(sorted(changed))


@cache
def derived_class(kind: type[nn.Module], ranked: type[RankedLayer]) -> type[RankedLayer]:
    """The ranked class of a subclass of ``ranked.plain`` that overrides nothing it runs by."""
    own = {"plain": kind, "ranked": ranked, "__module__": kind.__module__}
    bases = (Derived, ranked, kind)
    made = types.new_class(f"Ranked{kind.__name__}", bases, exec_body=lambda n: n.update(own))
    return cast(type[RankedLayer], made)


class Derived(nn.Module):
    """The base class of the classes made here, which pickle does not find under their names."""

    plain: ClassVar[type[nn.Module]]
    ranked: ClassVar[type[RankedLayer]]

    def __init_subclass__(cls, **_: Any) -> None:
        """Nothing: no registry of subclasses that a user may keep is told."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled as the two classes it is made from."""
        return _blank, (self.plain, self.ranked), cast(Any, self).__getstate__()


def _blank(kind: type[nn.Module], ranked: type[RankedLayer]) -> nn.Module:
    if names := overridden(kind, ranked):
        raise TypeError(
            f"{kind.__name__} overrides {', '.join(names)} here, but did not where this layer was "
            "saved: load it with the class it had, merge the model, and save it again"
        )
    made = derived_class(kind, ranked)
    return made.__new__(made)


def defined(classes: Iterable[type]) -> set[str]:
    """The names that classes define or annotate."""
    return {name for c in classes for name in (*vars(c), *vars(c).get("__annotations__", ()))}


def _attribute(kind: type, name: str) -> object:
    found = (vars(c)[name] for c in kind.__mro__ if name in vars(c))
    return next((value for value in found if name != "__slots__" or value), None)
