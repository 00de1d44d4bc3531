"""DDP rebuilt in place: a reducer for the parameters that its module has now.

DDP makes its reducer once, of the parameters of that time, and would average their gradients only.
The wrapper itself stays, with everything that is set or registered on it: the user's reference,
its forward hooks, ``no_sync``, ``torch.compile(ddp)`` go on. Private attributes of torch's are read
here only; tried with torch 2.13.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

__all__ = ["check_rebuildable", "rebuild"]


def check_rebuildable(wrapper: DistributedDataParallel, replaced: Iterable[Parameter]) -> None:
    """Raise ValueError if the wrapper cannot be rebuilt, or not rightly.

    Args:
        wrapper: the wrapper.
        replaced: the parameters that its module is going to lose.
    """
    own, old = cast(Any, wrapper), {id(p) for p in replaced}
    inside = {id(p): name for name, p in wrapper.module.named_parameters()}
    if ignored := [inside[i] for i in old if inside.get(i) in own.parameters_to_ignore]:
        raise ValueError(
            f"DistributedDataParallel was told to ignore {min(ignored)!r}, so it is not known "
            "whether all processes have the same one: leave this layer out (layers=)"
        )
    if own.mixed_precision is not None:
        raise ValueError(
            "DistributedDataParallel(mixed_precision=...) keeps a copy of each parameter, which "
            "would not follow a change of form: use torch.autocast instead"
        )
    if own._delay_all_reduce_params:
        raise ValueError(
            "DistributedDataParallel(delay_all_reduce_named_params=...) keeps a buffer of all "
            "gradients, which would not follow a change of form: leave this option out"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in wrapper.module.parameters()):
        raise ValueError(
            "optimizers that step during the backward pass (apply_optimizer_in_backward) hold "
            "their parameters one by one and cannot follow a change of form: use an optimizer of "
            "all parameters"
        )


def rebuild(wrapper: DistributedDataParallel) -> Callable[[], None]:
    """Give the wrapper a reducer of its module's parameters; returns how to restore hook states.

    What a communication hook remembers of each bucket (PowerSGD: errors and factors) is cleared,
    since there are other buckets.
    """
    own = cast(Any, wrapper)
    built_in = _built_in_hook(own)
    own.reducer._remove_autograd_hooks()
    for attributes in (vars(own), *_copies_with(own.reducer)):
        attributes.pop("reducer", None)  # it ends with its last reference
    own.logger = None
    ignored = own.parameters_to_ignore
    own._module_parameters[:] = [p for n, p in own.module.named_parameters() if n not in ignored]
    parameters, sparse = own._build_params_for_reducer()
    names = own._build_debug_param_to_name_mapping(parameters)
    own._ddp_init_helper(parameters, sparse, names, own.static_graph)
    own._has_rebuilt_buckets = False
    logger: Any = own.logger
    if own.static_graph:
        own._static_graph_delay_allreduce_enqueued = False
        own.reducer._set_static_graph()
        logger._set_static_graph()
    if built_in is not None:
        own._register_builtin_comm_hook(built_in)
    for hook, state in own._comm_hooks:
        dist._register_comm_hook(own.reducer, state, hook)  # pyright: ignore
        logger._set_comm_hook_name(hook.__qualname__)
    return _clear([table for _, state in own._comm_hooks for table in _of_buckets(state)])


def _copies_with(reducer: object) -> list[dict[str, Any]]:
    """Copies of the wrapper's attributes: torch.compile makes some (functools.wraps)."""
    found = [cast(dict[str, Any], d) for d in gc.get_referrers(reducer) if isinstance(d, dict)]
    return [one for one in found if one.get("reducer") is reducer]


def _built_in_hook(own: Any) -> Any:
    """The built-in communication hook that is registered, if any: only the logger tells."""
    name = str(own._get_ddp_logging_data().get("comm_hook", ""))
    return getattr(dist.BuiltinCommHookType, name.rpartition(".")[2], None)  # pyright: ignore


def _of_buckets(state: object) -> Iterator[MutableMapping[int, Tensor]]:
    """The tables of a communication hook's state that have a tensor for each bucket's number."""
    slots = [name for cls in type(state).__mro__ for name in vars(cls).get("__slots__", ())]
    for name in (*getattr(state, "__dict__", ()), *slots):
        value = getattr(state, name, None)
        if isinstance(value, MutableMapping) and value:
            table = cast(MutableMapping[Any, Any], value)
            if all(type(k) is int and isinstance(v, Tensor) for k, v in table.items()):
                yield table


def _clear(tables: list[MutableMapping[int, Tensor]]) -> Callable[[], None]:
    before = [(table, dict(table)) for table in tables]
    for table in tables:
        table.clear()

    def restore() -> None:
        for table, values in before:
            table.clear()
            table.update(values)

    return restore
