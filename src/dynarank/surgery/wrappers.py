"""Wrappers that hold a model's parameters: some follow a change of form, others are refused."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynarank.distributed.ddp import check_rebuildable, rebuild
from dynarank.distributed.unwrap import check_wrappers
from dynarank.distributed.wrappers import ddp_wrappers
from dynarank.surgery.site import Site

__all__ = ["check_unwrapped", "is_wrapper", "rebuild_wrappers", "wrappers_that_follow"]

_WRAPPERS = ("FullyShardedDataParallel",)


def is_wrapper(kind: type) -> bool:
    """Whether modules of this class wrap others and hold their parameters."""
    return any(cls.__name__ in _WRAPPERS for cls in kind.__mro__)


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError if a wrapper holds the model's parameters and would miss a change."""
    check_wrappers(model)
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS:
                raise ValueError(
                    f"{path or 'the model'!r} is wrapped by {cls.__name__}, which would go on with "
                    "the old parameters, silently out of step; change forms before wrapping"
                )


def wrappers_that_follow(sites: Sequence[Site]) -> list[DistributedDataParallel]:
    """The DDP wrappers around these weights.

    Raises:
        ValueError: one of them cannot follow a change.
    """
    if not sites or not (dist.is_available() and dist.is_initialized()):
        return []
    places = [place for site in sites for place in site.places]
    found = ddp_wrappers(place.module for place in places)
    for one in found:
        check_rebuildable(one, [p for site in sites for p in site.parameters().values()])
    return found


def rebuild_wrappers(wrappers: Sequence[DistributedDataParallel], undo: ExitStack | None) -> None:
    """Rebuild DDP wrappers; ``undo`` can give their communication hooks what they remembered."""
    for one in wrappers:
        restore = rebuild(one)
        if undo is not None:
            undo.callback(restore)
