"""Wrappers of models that hold its parameters, and would miss a change of form."""

from __future__ import annotations

from torch import nn

from dynarank.distributed.unwrap import check_wrappers

__all__ = ["check_unwrapped", "is_wrapper"]

_WRAPPERS = ("FullyShardedDataParallel", "FSDPModule")


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
