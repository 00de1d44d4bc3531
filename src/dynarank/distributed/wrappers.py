"""What is alive of a class, such as the wrappers around a model, which a trainer may hide.

A module does not know who wraps it, so the objects that are alive are looked through: some tenths
of a second in a large process, only at a change, and once for all who ask within it.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import compress
from typing import Any
from weakref import ref

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

__all__ = ["data_parallel_groups", "ddp_wrappers", "live", "one_scan", "thawed"]

_SHARED = (nn.Module, Optimizer)
_SCAN: ContextVar[list[ref[Any]] | None] = ContextVar("scan", default=None)  # empty: not made yet


@contextmanager
def thawed() -> Generator[None]:
    """The collector sees what ``gc.freeze()`` has put away, as training loops do to save time."""
    if not gc.get_freeze_count():
        yield
        return
    gc.collect()  # garbage is not to be frozen
    gc.unfreeze()
    try:
        yield
    finally:
        gc.freeze()


@contextmanager
def one_scan() -> Generator[None]:
    """Within it, modules and optimizers are looked for once; what is made later is not seen."""
    token = _SCAN.set([])
    try:
        yield
    finally:
        _SCAN.reset(token)


def live(*classes: type) -> list[Any]:
    """The objects of these classes (and subclasses) that are alive, half-made ones included.

    Those that ``gc.freeze()`` has put away too.
    """
    shared = _SCAN.get()
    if shared is None or not all(issubclass(kind, _SHARED) for kind in classes):
        return _of(classes, _objects())
    if not shared:
        shared += map(ref, _of(_SHARED, _objects()))
    return _of(classes, [one for weak in shared if (one := weak()) is not None])


def _objects() -> list[Any]:
    with thawed():
        return gc.get_objects()


def _of(classes: tuple[type, ...], objects: list[Any]) -> list[Any]:
    kinds = _with_subclasses(classes)
    return list(compress(objects, map(kinds.__contains__, map(type, objects))))


def _with_subclasses(classes: tuple[type, ...]) -> set[type]:
    found, todo = set[type](), list(classes)
    while todo:
        if (kind := todo.pop()) not in found:
            found.add(kind)
            todo += type.__subclasses__(kind)
    return found


def ddp_wrappers(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    """Every DDP wrapper that is alive and has one of these modules inside."""
    wanted = {id(module) for module in modules}
    alive = live(DistributedDataParallel)
    return [one for one in alive if any(id(m) in wanted for m in one.modules())]


def data_parallel_groups(modules: Iterable[nn.Module]) -> list[Any]:
    """The process groups over which gradients of these modules are averaged, each once."""
    groups = [one.process_group for one in ddp_wrappers(modules)]
    return [group for i, group in enumerate(groups) if group not in groups[:i]]
