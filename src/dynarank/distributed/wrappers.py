"""The wrappers around a model, found wherever they are: a trainer may hide them from its callbacks.

A module does not know who wraps it, so the objects that are alive are looked through: some tenths
of a second in a large process, and only in a run of several processes, at a change.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["data_parallel_groups", "ddp_wrappers"]


def ddp_wrappers(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    """Every DDP wrapper that is alive and has one of these modules inside."""
    wanted = {id(module) for module in modules}
    found = gc.get_objects()  # by type: a dead weak proxy cannot be asked for its class
    alive = [one for one in found if issubclass(type(one), DistributedDataParallel)]
    return [one for one in alive if any(id(m) in wanted for m in one.modules())]


def data_parallel_groups(modules: Iterable[nn.Module]) -> list[Any]:
    """The process groups over which gradients of these modules are averaged, each once."""
    groups = [one.process_group for one in ddp_wrappers(modules)]
    return [group for i, group in enumerate(groups) if group not in groups[:i]]
