"""Decompositions by name: the built-in ones, loaded when first asked for, and your own."""

from __future__ import annotations

from importlib import import_module

from dynarank.decompositions.base import Decomposition
from dynarank.decompositions.grouped import Grouped

__all__ = ["decomposition_names", "get_decomposition", "register_decomposition"]

_BUILT_IN = {"svd": "SVD", "tucker": "Tucker", "cp": "CP", "separable": "Separable"}
_LOADED: dict[str, Decomposition] = {}


def register_decomposition(decomposition: Decomposition) -> None:
    """Make a decomposition known by its name, to every verb, schedule and cost.

    Args:
        decomposition: an instance, with a name of its own.

    Raises:
        ValueError: it is not an instance of a :class:`Decomposition`, the name is taken, or the
            factors' names do not go from ``down`` to ``up``.

    Example:
        >>> dr.register_decomposition(dr.decompositions.get_decomposition("svd"))
        Traceback (most recent call last):
        ...
        ValueError: there is a decomposition 'svd' already (SVD): give yours another name
    """
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
            f"the factors of {name!r} are named from 'down', which the input is multiplied by, to "
            f"'up', each differently; got {factors}"
        )
    _LOADED[name] = decomposition


def get_decomposition(name: str, groups: int = 1) -> Decomposition:
    """The decomposition of this name; with ``groups``, of each group of a grouped weight.

    Raises:
        ValueError: there is none; the message lists those there are.

    Example:
        >>> get_decomposition("svd").shapes((64, 32), 8)
        ((8, 32), (64, 8))
    """
    if name not in _LOADED:
        if name not in _BUILT_IN:
            known = ", ".join(decomposition_names())
            raise ValueError(
                f"unknown decomposition {name!r}; known: {known}; "
                "add yours by dynarank.register_decomposition"
            )
        module = import_module(f"dynarank.decompositions.{name}")
        made = getattr(module, _BUILT_IN[name])()
        _LOADED.setdefault(name, made)  # another thread may have been first
    decomposition = _LOADED[name]
    return decomposition if groups == 1 else Grouped(decomposition, groups)


def decomposition_names() -> tuple[str, ...]:
    """The names of all decompositions, the built-in ones first.

    Example:
        >>> decomposition_names()[:4]
        ('svd', 'tucker', 'cp', 'separable')
    """
    return tuple(dict.fromkeys((*_BUILT_IN, *_LOADED)))
