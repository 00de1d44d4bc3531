"""FSDP2 (``fully_shard``): how it shards a module's parameters, and new ones in their places.

``fully_shard`` replaces each parameter by a DTensor, of which a process holds its shard, and keeps
it in an ``FSDPParam``, one of a group that is communicated together. For a layer's new parameters
:class:`Sharding` makes new ones of the same kind, beside the old; the commit of a
:class:`Resharding` puts them into the old ones' places.

The only file that touches torch's private classes of FSDP2. Source:
``torch/distributed/fsdp/_fully_shard`` of torch 2.13.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from dynarank.distributed.dtensors import scatter
from dynarank.distributed.unit_class import is_unit

__all__ = [
    "Resharding",
    "Sharding",
    "has_unreduced_gradients",
    "reshard",
    "sharded_parameters",
    "shardings",
    "sharing_ranks",
]

TRIED = ("2.13",)  # versions of torch that the tests have run with
# What is used of a group of parameters, of one parameter, and of its constructor.
_OF_GROUP = (
    "fsdp_params", "mesh_info", "post_forward_mesh_info", "device", "mp_policy", "offload_policy",
    "is_sharded", "wait_for_unshard", "_to_sharded", "_init_mp_dtypes", "_all_gather_result",
    "_partial_reduce_output",
)  # fmt: skip
_OF_PARAMETER = (
    "sharded_param", "fsdp_placement", "is_dtensor", "reset_sharded_param",
    "offload_to_cpu", "device", "unsharded_accumulated_grad", "_module_info", "_param_fqn",
    "_post_load_hook_handle",
)  # fmt: skip
_ARGUMENTS = (
    "param", "module_info", "mesh_info", "post_forward_mesh_info", "device",
    "shard_placement_fn", "mp_policy", "offload_policy",
)  # fmt: skip


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 shards parameters of a module: as a part of this group.

    Args:
        module: the module.
        group: torch's ``FSDPParamGroup``.
    """

    module: nn.Module
    group: Any

    @property
    def ranks(self) -> frozenset[int]:
        """The processes that share the parameters, by their global ranks."""
        return _ranks(self.group)

    @property
    def device(self) -> torch.device:
        """The device that whole parameters are on."""
        return self.group.device

    def shards(self) -> dict[str, Parameter]:
        """The module's parameters in shards, by name, also while the module has whole ones."""
        return {name: q.sharded_param for name, q in self._own().items()}

    def is_gathered(self) -> bool:
        """Whether the module has whole parameters now, as within a forward pass."""
        return not self.group.is_sharded

    def obstacle(self, name: str) -> str:
        """Why the parameter of this name cannot be replaced; empty if it can."""
        q = self._own().get(name)
        if q is not None and q.is_dtensor:
            return "sharded by tensor parallelism, too"
        return ""

    def settle(self, path: str) -> None:
        """Have the module have its shards, as between steps.

        Raises:
            ValueError: gradients of the layer at this path are not yet reduced over the processes.
        """
        waiting = self.group._partial_reduce_output is not None
        if waiting or any(map(_waits, self.group.fsdp_params)):
            raise ValueError(
                f"layer {path!r}: gradients of its fully_shard group are not yet reduced over the "
                "processes (set_requires_gradient_sync(False) or set_requires_all_reduce(False)), "
                "so a change would lose them: change forms after optimizer.step()"
            )
        if self.group._all_gather_result is not None:  # of unshard(async_op=True)
            self.group.wait_for_unshard()
        self.group._to_sharded()
        for q in self.group.fsdp_params:
            if _shard(q, self.group) is not q.sharded_param:
                q.reset_sharded_param()

    def reshard(
        self,
        old: Iterable[str],
        new: Mapping[str, Parameter],
        modules: Sequence[nn.Module],
        owner: int,
    ) -> Resharding:
        """Shard new parameters as old ones are. Nothing is replaced yet.

        All processes that share them must call it.

        Args:
            old: the names of the old ones.
            new: the new ones by name, whole in the owner's process; on the meta device elsewhere.
                So are their gradients, if they have any.
            modules: the modules that share them, this one first.
            owner: the process that has them, by its global rank.

        Raises:
            ValueError: parameters of one group would train in several dtypes.
        """
        own = self._own()
        replaced = [own[name] for name in old]
        self._check_dtypes(replaced, new)
        made = [self._empty(replaced[0], name, p) for name, p in new.items()]
        for q, p in zip(made, new.values(), strict=True):
            _fill(q, p, owner)
            name = q._module_info.param_name
            q._module_info = type(q._module_info)(*modules[:1], name, *_shared(modules[1:], name))
        return Resharding(self.group, replaced, made)

    def _empty(self, like: Any, name: str, p: Parameter) -> Any:
        """A new ``FSDPParam`` without values, of a module that stands for the real one."""
        from torch.distributed.tensor import Shard

        dim, count = like.fsdp_placement.dim, getattr(self.group.mesh_info, "shard_mesh_size", 1)
        placement = Shard(dim if dim < p.ndim and p.shape[dim] % count == 0 else 0)

        def place(_: Parameter) -> Shard:
            return placement

        module, group, info = nn.Module(), self.group, type(like._module_info)
        empty = Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)
        module.register_parameter(name, empty)
        meshes = group.mesh_info, group.post_forward_mesh_info
        policies = group.mp_policy, group.offload_policy
        made = type(like)(empty, info(module, name), *meshes, group.device, place, *policies)
        _unfollow_loads(made)
        if like._param_fqn is not None:
            made._param_fqn = f"{like._param_fqn.rpartition('.')[0]}.{name}".lstrip(".")
        return made

    def _own(self) -> dict[str, Any]:
        """The ``FSDPParam`` of each of the module's parameters, by name."""
        homes = ((q, module, name) for q in self.group.fsdp_params for module, name in _homes(q))
        return {name: q for q, module, name in homes if module is self.module}

    def _check_dtypes(self, replaced: Sequence[Any], new: Mapping[str, Parameter]) -> None:
        gone = set(map(id, replaced))
        others = [q.sharded_param for q in self.group.fsdp_params if id(q) not in gone]
        stay = {p.dtype for p in others if p.requires_grad}
        for name, p in new.items():
            if p.requires_grad and (rest := stay - {p.dtype}):
                raise ValueError(
                    f"its {name} would train in {p.dtype}, others of its fully_shard group in "
                    f"{rest.pop()}: FSDP2 reduces the gradients of a group in one dtype; convert "
                    "the model to one, or call fully_shard on this layer, too"
                )


@dataclass(frozen=True)
class Resharding:
    """Sharded parameters that are to take the places of others in a group."""

    group: Any
    old: Sequence[Any]
    made: Sequence[Any]

    @property
    def new(self) -> dict[str, Parameter]:
        """The new parameters in shards, by name."""
        return {q._module_info.param_name: q.sharded_param for q in self.made}

    def reverse(self) -> Resharding:
        """The one that takes this one back."""
        return Resharding(self.group, self.made, self.old)

    def commit(self, undo: ExitStack) -> None:
        """Replace the old ones; ``undo`` can take it back. The module has the new ones already."""
        before, gone = self.group.fsdp_params, set(map(id, self.old))
        at = next(i for i, q in enumerate(before) if id(q) in gone)
        stay = [q for q in before if id(q) not in gone]
        undo.callback(self.group._init_mp_dtypes)  # last: the stack is called from its end
        undo.callback(setattr, self.group, "fsdp_params", before)
        self.group.fsdp_params = [*stay[:at], *self.made, *stay[at:]]
        for q in self.old:
            undo.callback(_follow_loads, q)
            _unfollow_loads(q)
        for q in self.made:
            undo.callback(_unfollow_loads, q)
            _follow_loads(q)
        self.group._init_mp_dtypes()


def shardings(model: nn.Module) -> dict[int, tuple[Parameter, Any]]:
    """Each sharded parameter of a model and its group, by the id of what its module has for it.

    That is the shard itself, or the whole parameter that FSDP2 has gathered for now.

    Raises:
        ValueError: this version of torch lacks what changes of form use of FSDP2.
    """
    units = [module for module in model.modules() if is_unit(type(module))]
    groups = {id(group): group for unit in units for group in _groups(unit)}
    return {
        id(p): (_shard(q, group), group)
        for group in groups.values()
        for q in group.fsdp_params
        for p in (_shard(q, group), *_gathered(q))
    }


def sharing_ranks(modules: Iterable[nn.Module]) -> list[frozenset[int]]:
    """The global ranks of the processes that share parameters of these modules' units."""
    groups = [g for module in modules if is_unit(type(module)) for g in _groups(module)]
    return [*{_ranks(group) for group in groups}]


def sharded_parameters(unit: nn.Module) -> Iterator[Parameter]:
    """The parameters that a unit shards itself, not its units inside."""
    for group in _groups(unit):
        for q in group.fsdp_params:
            yield from (q.sharded_param, *_gathered(q))


def reshard(modules: Iterable[nn.Module]) -> None:
    """Have modules have their shards, which optimizers hold, as between steps.

    After a forward pass without a backward one, an evaluation, the root has whole parameters.
    """
    for group in (g for module in modules if is_unit(type(module)) for g in _groups(module)):
        group._to_sharded()


def has_unreduced_gradients(modules: Iterable[nn.Module]) -> bool:
    """Whether gradients of these modules' units are not reduced over the processes yet."""
    groups = [g for module in modules if is_unit(type(module)) for g in _groups(module)]
    waiting = (
        g._partial_reduce_output is not None or any(map(_waits, g.fsdp_params)) for g in groups
    )
    return any(waiting)


def _groups(unit: Any) -> list[Any]:
    """The groups of a unit's parameters."""
    state = unit._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is None:  # before several meshes in a unit
        several = [getattr(state, "_fsdp_param_group", None)]
    groups = [group for group in several if group is not None and group.fsdp_params]
    for group in groups:
        q = group.fsdp_params[0]
        _check_torch(type(group), frozenset(n for n in _OF_GROUP if not hasattr(group, n)))
        _check_torch(type(q), frozenset(n for n in _OF_PARAMETER if not hasattr(q, n)))
    return groups


@cache
def _check_torch(kind: type, lacking: frozenset[str]) -> None:
    """Raise ValueError if what is used of FSDP2 is not there; warn once of an untried version."""
    parameter = kind.__name__ == "FSDPParam"
    missing = [f"{kind.__name__}.{name}" for name in sorted(lacking)]
    if parameter and tuple(inspect.signature(kind).parameters) != _ARGUMENTS:
        missing.append(f"{kind.__name__}({', '.join(_ARGUMENTS)})")
    tried = f"They were tried with torch {', '.join(TRIED)}"
    if missing:
        raise ValueError(
            "changes of form under fully_shard use private classes of torch's, and torch "
            f"{torch.__version__} does not have {', '.join(missing)}. {tried}: use that, or change "
            "forms before fully_shard"
        )
    if parameter and torch.__version__.rpartition(".")[0] not in TRIED:
        warnings.warn(
            "changes of form under fully_shard use private classes of torch's, here those of torch "
            f"{torch.__version__}. {tried}: compare the first losses with those of one process",
            RuntimeWarning,
            stacklevel=2,
        )


def _ranks(group: Any) -> frozenset[int]:
    return frozenset(group.mesh_info.mesh.mesh.flatten().tolist())


def _homes(q: Any) -> list[tuple[nn.Module, str]]:
    """The modules that have a parameter, each with its name there."""
    info = q._module_info
    shared = zip(info.shared_modules, info.shared_param_names, strict=True)
    return [(info.module, info.param_name), *shared]


def _gathered(q: Any) -> list[Parameter]:
    """What a module has for a parameter in a forward pass, or between it and the backward pass."""
    found = (getattr(q, name, None) for name in ("_unsharded_param", "_sharded_post_forward_param"))
    return [p for p in found if p is not None]


def _shard(q: Any, group: Any) -> Parameter:
    """The shard of a parameter, also if the model was converted (``to_empty``) since it was made.

    FSDP2 itself looks for that in the first forward pass.
    """
    module, name = _homes(q)[0]
    return module.get_parameter(name) if group.is_sharded else q.sharded_param


def _waits(q: Any) -> bool:
    """Whether a parameter has a gradient that is not reduced over the processes."""
    return q.unsharded_accumulated_grad is not None or any(p.grad is not None for p in _gathered(q))


def _fill(q: Any, p: Parameter, owner: int) -> None:
    """Give it its shard of a parameter and its gradient, as a load after ``to_empty`` does."""
    at = torch.device("cpu") if q.offload_to_cpu else q.device
    value = scatter(p, q.sharded_param, owner, q.device, at)
    module, name = q._module_info.module, q._module_info.param_name
    module.register_parameter(name, Parameter(value, p.requires_grad))
    q.reset_sharded_param()
    if p.grad is not None:
        q.sharded_param.grad = scatter(p.grad, q.sharded_param, owner, q.device, at)


def _shared(modules: Sequence[nn.Module], name: str) -> tuple[list[nn.Module], list[str]]:
    """Modules that have a parameter too, and its names there."""
    return list(modules), [name] * len(modules)


def _follow_loads(q: Any) -> None:
    """Have it look at the module's parameter after each load, as its constructor does."""

    def loaded(*_: object) -> None:
        q.reset_sharded_param()

    hook = q._module_info.module.register_load_state_dict_post_hook
    q._post_load_hook_handle = hook(loaded)


def _unfollow_loads(q: Any) -> None:
    q._post_load_hook_handle.remove()
