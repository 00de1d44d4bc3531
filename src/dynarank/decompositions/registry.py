"""The registry of decompositions by name: the built-in ones, imported lazily, and your own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dynarank.files.nearest import did_you_mean

if TYPE_CHECKING:
    from dynarank.decompositions.base import Decomposition

__all__ = ["decomposition_names", "get_decomposition", "register_decomposition"]

_BUILT_IN = {"svd": "SVD", "tucker": "Tucker", "cp": "CP", "separable": "Separable"}
_LOADED: dict[str, Decomposition] = {}


def register_decomposition(decomposition: Decomposition) -> None:
    """Register a decomposition, so that forms can refer to it by its name.

    Args:
        decomposition: an instance of a subclass of :class:`Decomposition` with a unique ``name``.

    Raises:
        ValueError: it is not an instance of a :class:`Decomposition`, the name is missing or taken,
            or the factor names do not go from ``down`` to ``up``.

    Example:
        >>> dr.decompositions.register_decomposition(dr.decompositions.get_decomposition("svd"))
        Traceback (most recent call last):
        ...
        ValueError: there is a decomposition 'svd' already (SVD): give yours another name
    """
    from dynarank.decompositions.base import Decomposition  # torch: names alone need none

    if not isinstance(decomposition, Decomposition):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"register an instance of a subclass of dynarank.decompositions.Decomposition, "
            f"such as Mine(), got {decomposition!r}"
        )
    name = getattr(decomposition, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{type(decomposition).__name__} needs a name, a class attribute `name`")
    if name in decomposition_names():
        known = _LOADED[name] if name in _LOADED else _BUILT_IN[name]
        kind = known if isinstance(known, str) else type(known).__name__
        raise ValueError(
            f"there is a decomposition {name!r} already ({kind}): give yours another name"
        )
    factors = decomposition.factor_names(0)
    if (factors[0], factors[-1]) != ("down", "up") or len(set(factors)) < max(len(factors), 2):
        raise ValueError(
            f"the factor names of {name!r} must be unique and go from 'down', which is applied to "
            f"the input, to 'up'; got {factors}"
        )
    _LOADED[name] = decomposition


def get_decomposition(name: str, groups: int = 1) -> Decomposition:
    """Look up a decomposition by name.

    Args:
        name: the name under which it is registered.
        groups: the number of groups of the weight; each group is decomposed on its own.

    Raises:
        ValueError: an unknown name; the message lists the known ones.

    Example:
        >>> get_decomposition("svd").shapes((64, 32), 8)
        ((8, 32), (64, 8))
    """
    if name not in _LOADED:
        if name not in _BUILT_IN:
            known = decomposition_names()
            raise ValueError(
                f"unknown decomposition {name!r}; known: {', '.join(known)}"
                f"{did_you_mean(name, known)}; add yours by "
                "dynarank.decompositions.register_decomposition"
            )
        module = import_module(f"dynarank.decompositions.{name}")
        made = getattr(module, _BUILT_IN[name])()
        _LOADED.setdefault(name, made)  # another thread may have been first
    decomposition = _LOADED[name]
    if groups == 1:
        return decomposition
    from dynarank.decompositions.grouped import Grouped

    return Grouped(decomposition, groups)


def decomposition_names() -> tuple[str, ...]:
    """The names of all decompositions, the built-in ones first.

    Example:
        >>> decomposition_names()[:4]
        ('svd', 'tucker', 'cp', 'separable')
    """
    return tuple(dict.fromkeys((*_BUILT_IN, *_LOADED)))
