"""The user's module inside the wrappers of torch and of trainers.

Wrappers are known by their classes' names, so that importing them is left to who uses them.
"""

from __future__ import annotations

from torch import nn

__all__ = ["check_wrappers", "inside", "unwrapped"]

# Where each wrapper has the module that it wraps.
_INSIDE = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DeepSpeedEngine": "module",
    "_FabricModule": "_forward_module",  # Lightning Fabric
}
# These flatten parameters into buffers of their own, which no new parameter can enter.
_REFUSED = {
    "FullyShardedDataParallel": "shard it with fully_shard (FSDP2) instead",
    "DeepSpeedEngine": "use DDP or fully_shard (FSDP2) instead",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it, whatever their order.

    Example:
            >>> unwrapped(nn.DataParallel(nn.Linear(2, 1)))
            Linear(in_features=2, out_features=1, bias=True)
    """
    while (name := inside(model)) is not None:
        model = getattr(model, name)
    return model


def inside(module: nn.Module) -> str | None:
    """The attribute in which a wrapper has the module that it wraps; None: it is no wrapper."""
    return next((_INSIDE[name] for name in _class_names(module) if name in _INSIDE), None)


def check_wrappers(model: nn.Module) -> None:
    """Raise ValueError if a wrapper, around the model or inside it, cannot follow a change."""
    for path, module in model.named_modules():
        for name in _class_names(module):
            if name in _REFUSED:
                raise ValueError(
                    f"{path or 'the model'!r} is wrapped by {name}, which keeps parameters in flat "
                    f"buffers that cannot follow a change of form: {_REFUSED[name]}, or change "
                    "forms before wrapping"
                )


def _class_names(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(module).__mro__]
