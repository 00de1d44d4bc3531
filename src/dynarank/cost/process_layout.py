"""What one of several processes holds of a model, and what a step communicates.

Legend: S shards, R replicas, S * R processes. DDP is S = 1, FSDP2 is R = 1, HSDP has both. FSDP2
cuts a parameter along its first dimension into S blocks of ``ceil(rows / S)`` rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

__all__ = [
    "ProcessLayout",
    "ProcessMemory",
    "StepTraffic",
    "local_numel",
    "process_memory",
    "step_traffic",
]


@dataclass(frozen=True)
class ProcessLayout:
    """How a model lies over processes: ``replicas`` groups, of ``shards`` processes each.

    Args:
        shards: the processes that share one copy of the parameters; 1: none do, as in DDP.
        replicas: the copies; 1: as in FSDP2. Both above 1: HSDP.
        units: the paths of the modules given to ``fully_shard`` before the model itself.
        gather_itemsize: bytes of a gathered entry, those of ``MixedPrecisionPolicy(param_dtype)``;
            None: those of the parameter.
        reduce_itemsize: bytes of an entry of a communicated gradient, those of
            ``MixedPrecisionPolicy(reduce_dtype)`` or of a communication hook; None: its own.
        micro_batches: forward and backward passes of an optimizer step. Each gathers and scatters;
            gradients are all-reduced once (``no_sync``, ``set_requires_all_reduce``).

    Raises:
        ValueError: a number below 1.
    """

    shards: int = 1
    replicas: int = 1
    units: tuple[str, ...] = ()
    gather_itemsize: int | None = None
    reduce_itemsize: int | None = None
    micro_batches: int = 1

    def __post_init__(self) -> None:
        for name in ("shards", "replicas", "micro_batches"):
            if (given := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {given}; it counts from 1")

    @property
    def processes(self) -> int:
        """S * R."""
        return self.shards * self.replicas


@dataclass(frozen=True)
class ProcessMemory:
    """The bytes that a process holds, of the process that holds most; no activations.

    Args:
        parameters: its shards, frozen ones included.
        gradients: of the trainable ones.
        optimizer: of the state of these.
        buffers: for communication. DDP: the buckets, as large as the gradients (none with
            ``gradient_as_bucket_view=True``). FSDP2: the gathered parameters of the root and of the
            largest unit, and this unit's gradients; units gathered in advance come on top.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class StepTraffic:
    """The bytes of the tensors that an optimizer step communicates, of one process.

    Args:
        all_gathered: of the outputs of all-gathers, frozen parameters included.
        reduce_scattered: of the inputs of reduce-scatters.
        all_reduced: of the gradients that are all-reduced between replicas.
    """

    all_gathered: int
    reduce_scattered: int
    all_reduced: int

    def sent(self, layout: ProcessLayout) -> tuple[float, float]:
        """The bytes that a process sends in its shard group, and to its replicas, by rings.

        ``(S - 1) / S`` of what is gathered or scattered, ``2 (R - 1) / R`` of what is all-reduced
        (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
        2009).
        """
        shards, replicas = layout.shards, layout.replicas
        moved = self.all_gathered + self.reduce_scattered
        return moved * (shards - 1) / shards, self.all_reduced * 2 * (replicas - 1) / replicas


def local_numel(shape: Iterable[int], shard: int, shards: int) -> int:
    """The entries of a parameter in one of S shards.

    Example:
        >>> [local_numel((5, 2), shard, 4) for shard in range(4)]
        [4, 4, 2, 0]
    """
    rows, *rest = shape
    block = -(-rows // shards)
    own = max(0, min(block, rows - shard * block))
    return own * math.prod(rest)


def process_memory(model: nn.Module, layout: ProcessLayout, *, slots: int = 2) -> ProcessMemory:
    """What a process holds of a model in its forms; the model may be on the meta device.

    Args:
        model: the model, not wrapped.
        layout: how it lies over processes.
        slots: the entries of optimizer state per trainable entry: 2 for Adam.

    Raises:
        AttributeError: the model has no such unit.

    Example:
        >>> process_memory(nn.Linear(6, 4, bias=False), ProcessLayout(shards=2))
        ProcessMemory(parameters=48, gradients=48, optimizer=96, buffers=192)
    """
    units = _units(model, layout)
    parameters = [p for unit in units.values() for p in unit]
    gradients = _stored(_trained(parameters), layout)
    return ProcessMemory(
        _stored(parameters, layout), gradients, slots * gradients, _buffers(units, layout)
    )


def step_traffic(model: nn.Module, layout: ProcessLayout) -> StepTraffic:
    """What an optimizer step of a model in its forms communicates.

    A unit is gathered for the forward and again for the backward pass; the root, which
    ``fully_shard`` does not reshard in between, once.

    Args:
        model: the model, not wrapped; it may be on the meta device.
        layout: how it lies over processes.

    Example:
        >>> step_traffic(nn.Linear(6, 4), ProcessLayout(replicas=8))
        StepTraffic(all_gathered=0, reduce_scattered=0, all_reduced=112)
    """
    units, shards = _units(model, layout), layout.shards
    gathered, reduced, size = 0, 0, layout.reduce_itemsize
    for path, parameters in units.items():
        passes = 2 if path else 1
        gathered += passes * _gathered(parameters, layout)
        reduced += sum(_own(p, shards) * (size or p.itemsize) for p in _trained(parameters))
    times, sharded, replicated = layout.micro_batches, shards > 1, layout.replicas > 1
    return StepTraffic(
        times * gathered if sharded else 0,
        times * shards * reduced if sharded else 0,
        reduced if replicated else 0,
    )


def _units(model: nn.Module, layout: ProcessLayout) -> dict[str, list[nn.Parameter]]:
    """The parameters of each unit, each in the innermost; the root's path is empty."""
    for path in layout.units:
        model.get_submodule(path)
    units: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        inside = [path for path in layout.units if name.startswith(f"{path}.")]
        units[max(inside, key=len, default="")].append(parameter)
    return units


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _own(parameter: nn.Parameter, shards: int) -> int:
    """The entries of the largest shard; FSDP2 pads all shards to it."""
    return local_numel(parameter.shape or (1,), 0, shards)


def _stored(parameters: Iterable[nn.Parameter], layout: ProcessLayout) -> int:
    return sum(_own(p, layout.shards) * p.itemsize for p in parameters)


def _gathered(parameters: Iterable[nn.Parameter], layout: ProcessLayout) -> int:
    """The bytes of whole parameters, with their padding, in the dtype of the computation."""
    size = layout.gather_itemsize
    return layout.shards * sum(_own(p, layout.shards) * (size or p.itemsize) for p in parameters)


def _buffers(units: Mapping[str, list[nn.Parameter]], layout: ProcessLayout) -> int:
    if layout.shards == 1:  # the buckets of DDP
        trained = _trained(p for unit in units.values() for p in unit)
        return _stored(trained, layout) if layout.replicas > 1 else 0
    held = {
        path: (_gathered(unit, layout), _gathered(_trained(unit), layout))
        for path, unit in units.items()
    }
    root = held.pop("", (0, 0))
    return root[0] + max(map(sum, held.values()), default=root[1])
