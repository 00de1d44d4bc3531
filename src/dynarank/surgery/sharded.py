"""A change of form under FSDP2 (``fully_shard``): one layer at a time is whole, in one process.

The owner of a layer prepares its change from whole tensors, as of any layer (:func:`gathered`);
what it made is sent to all, and each process keeps its shards of it (:func:`resharded`,
:func:`state_in_shards`), beside the old ones, until all layers are committed.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dynarank.distributed.dtensors import gather, is_dtensor, like_shards
from dynarank.layers import own_parameters
from dynarank.surgery.edit import Edit, check_replaceable, restore_on_exit
from dynarank.surgery.own_references import groups_of, wrapped
from dynarank.surgery.settings import attributes, predecessors
from dynarank.surgery.site import Site

__all__ = ["gathered", "resharded", "state_in_shards"]


@contextmanager
def gathered(site: Site, optimizers: Sequence[Any], owner: int) -> Generator[bool]:
    """A context in which a weight is whole in one process; all processes that share it take part.

    In the owner's process the site's module has whole parameters with whole gradients, and the
    optimizers' groups and states hold these. Elsewhere nothing changes. Gives whether this process
    is the owner.

    Args:
        site: a weight that ``fully_shard`` shards.
        optimizers: those that train it.
        owner: the process, by its global rank.

    Raises:
        ValueError: the parameters have gradient hooks, or gradients that are not reduced yet.
    """
    assert site.sharding is not None
    check_replaceable(site.path, site.parameters())
    site.sharding.settle(site.path)
    stores = _stores(optimizers)
    bias = own_parameters(site.module).get("bias")
    sharded = {id(p): p for p in (*site.parameters().values(), bias) if p is not None}
    whole = {
        key: _whole(p, stores, owner, site.sharding.device)
        for key, p in sharded.items()
        if is_dtensor(p)
    }
    mine = torch.distributed.get_rank() == owner
    with ExitStack() as undo:
        if mine:
            _hold(site, optimizers, {key: one for key, one in whole.items() if one}, undo)
        yield mine


def resharded(edit: Edit) -> Edit:
    """The edit with this process's shards of its new parameters, ready to be committed.

    Args:
        edit: of whole values (with their gradients), the same in all processes.
    """
    site, old = edit.site, edit.site.parameters()
    assert site.sharding is not None
    if not edit.new:
        return edit
    made = site.sharding.reshard(old, edit.new, [place.module for place in site.places])
    for name, p in made.new.items():
        vars(p).update(attributes(site.path, predecessors(old, name), p))
    shift, bias = edit.shift, own_parameters(site.module).get("bias")
    if shift is not None and bias is not None and is_dtensor(bias):
        shift = like_shards(shift, bias)
    return replace(edit, old=old, new=made.new, shift=shift, resharding=made)


def state_in_shards(state: Mapping[str, Any], parameter: Parameter) -> dict[str, Any]:
    """An optimizer's state of a whole parameter, as that of its shards; counts stay as they are."""
    return {
        key: like_shards(v, parameter) if isinstance(v, Tensor) and v.ndim > 0 else v
        for key, v in state.items()
    }


def _stores(optimizers: Sequence[Any]) -> list[dict[Any, Any]]:
    """The states of the optimizers and of those they wrap, each once."""
    family = [one for optimizer in optimizers for one in wrapped(optimizer)]
    return [*{id(one.state): one.state for one in family if isinstance(one.state, dict)}.values()]


def _whole(
    p: Parameter, stores: Sequence[dict[Any, Any]], owner: int, device: torch.device
) -> tuple[Parameter, list[dict[str, Any]]] | None:
    """A parameter with its gradient and its states in these stores, whole; None but in the owner.

    What is gathered goes in a fixed order, the same in all processes.
    """
    value = gather(p, owner, device)
    gradient = None if p.grad is None else gather(p.grad, owner, device)
    states = list[dict[str, Any]]()
    for store in stores:
        state: Mapping[str, Any] = store.get(p, {})
        tensors = {key: v for key, v in state.items() if isinstance(v, Tensor) and is_dtensor(v)}
        found = {key: gather(tensors[key], owner, device) for key in sorted(tensors)}
        states.append({key: found.get(key, v) for key, v in state.items()})
    if value is None:
        return None
    whole = Parameter(value, requires_grad=p.requires_grad)
    whole.grad = gradient
    vars(whole).update(vars(p))
    return whole, states


def _hold(
    site: Site,
    optimizers: Sequence[Any],
    whole: Mapping[int, tuple[Parameter, list[dict[str, Any]]]],
    undo: ExitStack,
) -> None:
    """Put whole parameters into the modules, groups and states that have the sharded ones."""
    for place in site.places:
        own = own_parameters(place.module)
        restore_on_exit(own, undo)
        own.update({n: whole[id(p)][0] for n, p in own.items() if id(p) in whole})
    for group in (g for optimizer in optimizers for g in groups_of(wrapped(optimizer))):
        held: list[Any] = group["params"]
        undo.callback(held.__setitem__, slice(None), held[:])
        held[:] = [whole[id(p)][0] if id(p) in whole else p for p in held]
    for i, store in enumerate(_stores(optimizers)):
        restore_on_exit(store, undo)
        for p in [p for p in store if id(p) in whole]:
            del store[p]
            new, states = whole[id(p)]
            store[new] = states[i]
