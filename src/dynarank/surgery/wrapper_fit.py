"""Wrappers around a model, and whether what they know of its parameters is still true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import nn

from dynarank.distributed.fsdp2 import sharded_parameters
from dynarank.distributed.unwrap import inside, unwrapped
from dynarank.surgery.problem import Problem, listed

__all__ = ["key_problems", "wrapper_problems"]


def wrapper_problems(model: nn.Module) -> Iterator[Problem]:
    """I8: parameters that train, of which the wrapper that averages gradients does not know."""
    sharded, units = set[int](), list[tuple[str, nn.Module]]()
    for path, module in model.named_modules():
        kinds = _class_names(module)
        if "DistributedDataParallel" in kinds:
            yield from _ddp(path, module)
        elif "FSDPModule" in kinds or "FullyShardedDataParallel" in kinds:
            units.append((path, module))
            sharded |= {id(p) for p in _sharded(module)}
    known = set[str]()
    for path, module in units:
        own = {name for name, p in module.named_parameters(path) if p.requires_grad}
        lost = {n for n, p in module.named_parameters(path) if n in own and id(p) not in sharded}
        if lost - known:
            yield Problem(
                "I8",
                path or "the model",
                f"FSDP does not know the parameters {listed(lost)}, which train: their gradients "
                "would differ from process to process; change forms before fully_shard",
            )
        known |= lost


def key_problems(model: nn.Module) -> Iterator[Problem]:
    """I11: wrappers inside the model that put their names into the keys of its ``state_dict``."""
    for path, module in unwrapped(model).named_modules():
        if path and (name := inside(module)) is not None:
            way = "compile in place, module.compile()" if name == "_orig_mod" else "wrap the model"
            yield Problem(
                "I11",
                path,
                f"{type(module).__name__} puts {name}. into the keys of the model's state_dict, "
                f"which the plain model does not have: {way}",
            )


def _ddp(path: str, wrapper: Any) -> Iterator[Problem]:
    ignored = set(wrapper.parameters_to_ignore)
    named: Mapping[str, nn.Parameter] = dict(wrapper.module.named_parameters())
    trains = {n: p for n, p in named.items() if p.requires_grad and n not in ignored}
    known = {id(p) for p in wrapper._module_parameters}
    lost = {name for name, p in trains.items() if id(p) not in known}
    count = wrapper._get_ddp_logging_data().get("num_parameter_tensors", len(trains))
    if lost or count != len(trains):
        said = f"does not know {listed(lost)}" if lost else f"was made with {count}"
        yield Problem(
            "I8",
            path or "the model",
            f"{len(trains)} parameters train, and DistributedDataParallel {said}: their gradients "
            "would not be averaged; wrap the model again, DistributedDataParallel(ddp.module)",
        )


def _sharded(module: Any) -> Iterator[nn.Parameter]:
    """The parameters that an FSDP unit shards itself."""
    if "FSDPModule" in _class_names(module):
        yield from sharded_parameters(module)
        return
    yield from module._ignored_params
    if (handle := module._handle) is not None:
        flat = handle.flat_param
        yield from chain([flat], flat._params or (), flat._shared_params or ())


def _class_names(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(module).__mro__]
