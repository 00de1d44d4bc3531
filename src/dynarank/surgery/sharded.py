"""A change of form under FSDP2 (``fully_shard``): a layer is whole in one process, its owner.

Within :func:`gathered` the owner prepares the change as of any layer (:func:`prepare_whole`). What
it made is told to the others, and each receives its shards (:meth:`WholeEdit.in_shards`), beside
the old ones, until all layers are committed. No process holds more than the one layer that it owns.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.decompositions.truncation import ActivationStats
from dynarank.distributed.dtensors import gather, is_dtensor, local_part, scatter
from dynarank.distributed.fsdp2 import Sharding, shardings
from dynarank.forms import Form, same_weight
from dynarank.layers import own_parameters
from dynarank.surgery.edit import (
    Edit,
    InShards,
    check_replaceable,
    check_values_known,
    prepare_edit,
    restore_on_exit,
)
from dynarank.surgery.gradients import move_gradients
from dynarank.surgery.optimizer_state import Moments, new_contents
from dynarank.surgery.own_references import groups_of, wrapped
from dynarank.surgery.settings import attributes, predecessors
from dynarank.surgery.site import Site

__all__ = [
    "WholeEdit",
    "check_gatherable",
    "check_moments",
    "check_order",
    "gathered",
    "is_resharded",
    "prepare_whole",
    "states_in_shards",
]


def is_resharded(site: Site, after: Form) -> bool:
    """Whether a change to this form gives a weight new parameters, which ``fully_shard`` shards."""
    return site.sharding is not None and site.form is not None and not same_weight(site.form, after)


def check_gatherable(
    wanted: Iterable[tuple[Site, Form]], moments: Moments, members: frozenset[int]
) -> None:
    """Have the modules of sharded weights that change have their shards, as between steps.

    Args:
        wanted: weights and their new forms.
        moments: the policy.
        members: the processes that make the change together, by their global ranks.

    Raises:
        ValueError: gradients of a weight are not reduced yet or have hooks, other processes share
            it, or the policy needs gradients that no process has whole.
    """
    for site in (site for site, after in wanted if is_resharded(site, after)):
        assert site.sharding is not None
        if site.sharding.ranks != members:
            raise ValueError(
                f"layer {site.path!r} is sharded over the processes {sorted(site.sharding.ranks)}, "
                f"and {sorted(members)} change forms together: leave it out (layers=), or shard "
                "all layers over the same processes"
            )
        if not isinstance(moments, str):
            check_moments([site], "calibrated")
        site.sharding.settle(site.path)
        check_replaceable(site.path, site.parameters())
        check_values_known(site.path, site.parameters())


def check_moments(sites: Iterable[Site], moments: Moments) -> None:
    """Raise ValueError if weights are sharded, and moments are to be calibrated on gradients."""
    sharded = [site.path for site in sites if site.sharding is not None]
    if sharded and (moments == "calibrated" or not isinstance(moments, str)):
        raise ValueError(
            f"layer {sharded[0]!r} is sharded by fully_shard, and moments='calibrated' needs whole "
            "gradients of several steps, which no process has: use moments='project'"
        )


def check_order(model: nn.Module, optimizers: Sequence[Any]) -> None:
    """Raise ValueError if the optimizers have none of the shards that ``fully_shard`` made."""
    held = {id(p) for one in optimizers for g in groups_of(wrapped(one)) for p in g["params"]}
    shards = [shard for shard, _ in shardings(model).values() if shard.requires_grad]
    if optimizers and shards and not any(id(p) in held for p in shards):
        raise ValueError(
            "the optimizer of this RankScheduler has none of the parameters that fully_shard made, "
            "so it trains nothing: make them in the order model, fully_shard, optimizer, "
            "RankScheduler"
        )


def states_in_shards(
    wanted: Iterable[tuple[Site, Form]], optimizers: Sequence[Any]
) -> dict[str, list[Any]]:
    """What is going to be gathered of sharded weights: the same in all processes, or they wait."""
    found = dict[str, list[Any]]()
    for site in (site for site, after in wanted if is_resharded(site, after)):
        for name, p in site.parameters().items():
            states = [store.get(p, {}) for store in _stores(optimizers)]
            tensors = [sorted(k for k, v in s.items() if isinstance(v, Tensor)) for s in states]
            found[f"{site.path}.{name}"] = [p.grad is not None, *tensors]
    return found


@contextmanager
def gathered(site: Site, optimizers: Sequence[Any], owner: int) -> Generator[None]:
    """A context in which a weight is whole in one process; all that share it must enter it.

    In the owner's process the module has whole parameters with whole gradients, and the optimizers'
    groups and states hold these. Elsewhere nothing changes.

    Args:
        site: a weight that has passed :func:`check_gatherable` in all processes.
        optimizers: those that train it.
        owner: the process, by its global rank.
    """
    assert site.sharding is not None
    stores, device = _stores(optimizers), site.sharding.device
    parameters = list(site.parameters().values())
    bias = own_parameters(site.module).get("bias")
    if bias is not None and is_dtensor(bias):  # a truncation may move it
        parameters.append(bias)
    found = [(p, _whole(p, stores, owner, device)) for p in parameters]
    with ExitStack() as undo:
        if torch.distributed.get_rank() == owner:
            whole = {id(p): one for p, one in found if one is not None}
            _hold(site, optimizers, whole, undo)
        yield


@dataclass(frozen=True)
class WholeEdit:
    """A prepared change of a sharded weight: whole in the owner's process, on meta elsewhere.

    Args:
        edit: the change.
        states: of each store of the optimizers' states: those of the new parameters, by name.
        norms: those of the new factors.
    """

    edit: Edit
    states: Sequence[Mapping[str, Mapping[str, Any]]]
    norms: tuple[float, ...]

    def told(self) -> Any:
        """What the others need to know to receive it, as plain data."""
        new = self.edit.new.items()
        tensors = {n: (_told(p), p.requires_grad, p.grad is not None) for n, p in new}
        states = [{n: _told(state) for n, state in store.items()} for store in self.states]
        return tensors, _told(self.edit.shift), states, self.norms

    @classmethod
    def received(cls, edit: Edit, told: Any) -> WholeEdit:
        """What another process told, without values; ``edit`` says what is changed."""
        tensors, shift, states, norms = told
        new = dict[str, Parameter]()
        for name, (value, trains, has_gradient) in tensors.items():
            new[name] = Parameter(_heard(value), requires_grad=trains)
            new[name].grad = _heard(value) if has_gradient else None
        return cls(replace(edit, new=new, shift=_heard(shift)), _heard(states), norms)

    def in_shards(self, optimizers: Sequence[Any], owner: int) -> Edit:
        """The edit in this process's shards; all that share the weight must call it.

        Raises:
            ValueError: parameters that FSDP2 reduces together would train in several dtypes.
        """
        edit, site = self.edit, self.edit.site
        sharding, old = site.sharding, site.parameters()
        assert sharding is not None
        made = sharding.reshard(old, edit.new, [place.module for place in site.places], owner)
        states = dict[int, dict[str, dict[str, Any]]]()
        for store, own in zip(_stores(optimizers), self.states, strict=True):
            new = ((name, state, made.new[name]) for name, state in own.items())
            states[id(store)] = {
                n: {key: _dealt(state[key], p, owner, sharding) for key in sorted(state)}
                for n, state, p in new
            }
        for name, p in made.new.items():
            vars(p).update(attributes(site.path, predecessors(old, name), p))
        shift, bias = edit.shift, own_parameters(site.module).get("bias")
        if shift is not None and bias is not None:
            shift = _dealt(shift, bias, owner, sharding)
        shards = InShards(made, self.norms, states)
        return replace(edit, old=old, new=made.new, shift=shift, shards=shards)


def prepare_whole(
    site: Site,
    after: Form,
    optimizers: Sequence[Any],
    moments: Moments,
    activity: ActivationStats | None = None,
    seed: int | None = None,
) -> WholeEdit:
    """Prepare a change in the owner's process, within :func:`gathered`; raises as its parts do."""
    edit = prepare_edit(site, after, activity, seed)
    contents = {id(table): new for table, new in new_contents([edit], optimizers, moments)}
    move_gradients(edit)
    states = list[dict[str, dict[str, Any]]]()
    for store in _stores(optimizers):
        new: Mapping[Any, Any] = contents.get(id(store), {})
        states.append({name: new[p] for name, p in edit.new.items() if p in new})
    return WholeEdit(edit, states, edit.norms)


def _stores(optimizers: Sequence[Any]) -> list[dict[Any, Any]]:
    """The tables of states of the optimizers and of those they wrap, each once."""
    family = [one for optimizer in optimizers for one in wrapped(optimizer)]
    return [*{id(one.state): one.state for one in family if isinstance(one.state, dict)}.values()]


def _whole(
    p: Parameter, stores: Sequence[Mapping[Any, Any]], owner: int, device: torch.device
) -> tuple[Parameter, list[dict[str, Any]]] | None:
    """A parameter with its gradient and its state in each store, whole; None but in the owner.

    The order of what is gathered is the same in all processes.
    """
    value = gather(p, owner, device)
    gradient = None if p.grad is None else gather(p.grad, owner, device)
    states = list[dict[str, Any]]()
    for store in stores:
        state: Mapping[str, Any] = store.get(p, {})
        split = sorted(k for k, v in state.items() if isinstance(v, Tensor) and is_dtensor(v))
        states.append({**state, **{key: gather(state[key], owner, device) for key in split}})
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
        own.update({name: whole[id(p)][0] for name, p in own.items() if id(p) in whole})
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


def _dealt(value: Any, like: Tensor, owner: int, sharding: Sharding) -> Any:
    """An entry of a state, or a change of a parameter, for this process; counts stay whole."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    part = scatter(value, like, owner, sharding.device, local_part(like).device)
    return part if is_dtensor(like) else local_part(part)


def _told(value: Any) -> Any:
    """A value to tell: of a tensor with entries its shape and dtype."""
    if isinstance(value, Mapping):
        return {key: _told(v) for key, v in value.items()}
    if not isinstance(value, Tensor):
        return value
    return _Shape(value.shape, value.dtype) if value.ndim else value.detach().cpu()


def _heard(told: Any) -> Any:
    """What was told, tensors on the meta device."""
    if isinstance(told, Mapping):
        return {key: _heard(v) for key, v in told.items()}
    if isinstance(told, list):
        return [_heard(v) for v in told]
    if isinstance(told, _Shape):
        return torch.empty(told.shape, dtype=told.dtype, device="meta")
    return told


class _Shape(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
