"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any

from dynarank.files.nearest import did_you_mean

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, str] = MappingProxyType({})
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package with lazy names; its modules are some too.

    Args:
        package: its ``__name__``.
        homes: the module of each name, below the package: ``module``, or ``module:name`` where it
            has another name there. A name may be that of a module itself.

    Example:
        >>> get, names = lazy_names("dynarank", {"decay": "schedules.rank_decay:Decay"})
        >>> get("decay"), "forms" in names()
        (<class 'dynarank.schedules.rank_decay.Decay'>, True)
        >>> get("dekay")
        Traceback (most recent call last):
        AttributeError: module 'dynarank' has no attribute 'dekay'; did you mean 'decay'?
    """

    @cache  # tools ask each module for names that none has
    def modules() -> set[str]:
        found = (module.name for module in iter_modules(sys.modules[package].__path__))
        return {name for name in found if not name.startswith("_")}

    def get(name: str) -> Any:
        home, _, original = homes.get(name, name if name in modules() else "").partition(":")
        if not home:
            hint = did_you_mean(name, {*homes, *modules()})
            message = f"module {package!r} has no attribute {name!r}{hint}"
            raise AttributeError(message, name=name)  # named: Python adds no hint of its own
        module = import_module(f"{package}.{home}")
        value = getattr(module, original or name, module)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *modules()})

    return get, names
