"""What is alive of a class, such as the wrappers around a model, which a trainer may hide.

A module does not know who wraps it, so the objects that are alive are looked through: some tenths
of a second in a large process, and only at a change.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["data_parallel_groups", "ddp_wrappers", "live", "thawed"]


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


def live(*classes: type) -> list[Any]:
    """The objects of these classes (and subclasses) that are alive, half-made ones included.

    Those that ``gc.freeze()`` has put away too.
    """
    with thawed():
        found = gc.get_objects()
    kinds = {kind for kind in set(map(type, found)) if issubclass(kind, classes)}
    return [one for one in found if type(one) in kinds]


def ddp_wrappers(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    """Every DDP wrapper that is alive and has one of these modules inside."""
    wanted = {id(module) for module in modules}
    alive = live(DistributedDataParallel)
    return [one for one in alive if any(id(m) in wanted for m in one.modules())]


def data_parallel_groups(modules: Iterable[nn.Module]) -> list[Any]:
    """The process groups over which gradients of these modules are averaged, each once."""
    groups = [one.process_group for one in ddp_wrappers(modules)]
    return [group for i, group in enumerate(groups) if group not in groups[:i]]
