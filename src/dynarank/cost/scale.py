"""A schedule on a cluster: what each process holds, sends and decomposes in each phase.

All of it follows from shapes; the model may be on the meta device. Bytes and FLOPs are exact;
seconds are those of the rates that a :class:`Cluster` states. Latency, pipelines of a few large
messages, stragglers and activations are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from dynarank.cost.flops import LayerUse, ModelUse
from dynarank.cost.process_layout import (
    ProcessLayout,
    ProcessMemory,
    StepTraffic,
    process_memory,
    step_traffic,
)
from dynarank.cost.schedule import PhaseCost, ScheduleCost
from dynarank.cost.stand_in import stand_in
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers import WeightSpec

__all__ = ["Cluster", "PhaseAtScale", "Transition", "at_scale", "decomposition_flops"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The rates that seconds are computed from: all of them assumptions, to be replaced by yours.

    Args:
        per_node: the processes of a machine.
        node_bandwidth: bytes a second that a process sends to others of its machine; 450e9 is
            NVLink 4 in one direction (NVIDIA H100 SXM data sheet: 900 GB/s in both).
        network_bandwidth: bytes a second that a process sends to other machines; 50e9 is one
            400 Gb/s adapter a GPU (NVIDIA DGX H100 data sheet).
        peak_flops: FLOPs a second of matrix products; 989e12 is bf16 without sparsity (NVIDIA H100
            SXM data sheet).
        utilization: the part of it that training reaches; 0.4 is what Llama 3 405B reached
            (Dubey et al., "The Llama 3 herd of models", arXiv 2407.21783: 38 to 43%).
        decomposition_flops: FLOPs a second of decompositions, of which most is an eigenproblem in
            fp32; 0.5e12 is a guess, under a hundredth of the peak of fp32 (67e12).

    Raises:
        ValueError: a rate that is not above 0.
    """

    per_node: int = 8
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    peak_flops: float = 989e12
    utilization: float = 0.4
    decomposition_flops: float = 0.5e12

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            if not given > 0:
                raise ValueError(f"{name} is {given}; it is above 0")

    def step_seconds(self, flops: float) -> float:
        """The time of the matrix products of a process."""
        return flops / (self.peak_flops * self.utilization)

    def shard_seconds(self, sent: float, layout: ProcessLayout) -> float:
        """The time to send bytes around a shard group, whose processes lie side by side."""
        return sent / self.bandwidth(layout.shards, layout.shards)

    def replica_seconds(self, sent: float, layout: ProcessLayout) -> float:
        """The time to send bytes around a parameter's replicas, one in each shard group."""
        return sent / self.bandwidth(layout.processes, self.per_node // layout.shards)

    def bandwidth(self, span: int, beside: int) -> float:
        """Bytes a second of a ring over so many consecutive processes.

        It leaves a machine by the network adapters of those of its members that lie beside each
        other on it.
        """
        if span <= self.per_node:
            return self.node_bandwidth
        adapters = min(max(beside, 1), self.per_node)
        return min(self.node_bandwidth, adapters * self.network_bandwidth)


@dataclass(frozen=True)
class Transition:
    """What it takes to come from one phase to the next.

    Layers are dealt over the processes by cost, one a process in each round, the costliest first;
    each is decomposed by one process, and its new parameters and states are sent to all.

    Args:
        layers: how many change.
        flops: of all decompositions and products.
        rounds: how many layers one process prepares at most.
        longest: the FLOPs of the costliest layer of each round, which the others wait for.
        gathered: bytes of the old parameters and states of these layers, which each owner gathers
            if they are sharded.
        broadcast: bytes of their new parameters and states. A full-rank weight that becomes the
            base of an adapter is in each process already.
        held: bytes of the old and new parameters and states of the largest of them, which its owner
            holds; one layer at a time.
    """

    layers: int
    flops: int
    rounds: int
    longest: int
    gathered: int
    broadcast: int
    held: int

    def decomposition_seconds(self, cluster: Cluster) -> float:
        """The time until all layers are decomposed."""
        return self.longest / cluster.decomposition_flops

    def communication_seconds(self, cluster: Cluster, layout: ProcessLayout) -> float:
        """The time to gather and to broadcast."""
        if layout.processes == 1:
            return 0.0
        gathered = self.gathered * (layout.shards - 1) / layout.shards
        received = gathered / cluster.bandwidth(layout.shards, 1)  # by the owner's own adapter
        sent = self.broadcast / cluster.bandwidth(layout.processes, layout.processes)
        return received + sent


@dataclass(frozen=True)
class PhaseAtScale:
    """A phase of a schedule in several processes.

    Args:
        cost: its steps and forms, and the FLOPs of a process, for its own batch.
        memory: what a process holds.
        traffic: what a step communicates.
        transition: what it takes to come into this phase; None: the run begins with it.
    """

    cost: PhaseCost
    memory: ProcessMemory
    traffic: StepTraffic
    transition: Transition | None

    def compute_seconds(self, cluster: Cluster) -> float:
        """The time of the matrix products of a micro-batch."""
        return cluster.step_seconds(self.cost.flops.training)

    def communication_seconds(self, cluster: Cluster, layout: ProcessLayout) -> float:
        """The time of a step's communication, if nothing of it is hidden behind computation."""
        sharded, replicated = self.traffic.sent(layout)
        return cluster.shard_seconds(sharded, layout) + cluster.replica_seconds(replicated, layout)


def at_scale(
    model: nn.Module, use: ModelUse, cost: ScheduleCost, layout: ProcessLayout, *, slots: int = 2
) -> tuple[PhaseAtScale, ...]:
    """What each phase of a schedule costs in several processes.

    Args:
        model: the model, not wrapped; it may be on the meta device.
        use: its trace, from :func:`dynarank.cost.trace`, of the micro-batch of one process.
        cost: the cost of the schedule, from :func:`dynarank.cost.cost_schedule`.
        layout: how the model lies over processes.
        slots: the entries of optimizer state per trainable entry: 2 for Adam.

    Raises:
        ValueError: a decomposition whose FLOPs are not known, see :func:`decomposition_flops`.

    Example:
        >>> from dynarank.cost import cost_schedule, trace
        >>> model = nn.Sequential(nn.Linear(64, 64, bias=False))
        >>> use = trace(model, torch.ones(8, 64))
        >>> schedule = dr.schedules.dynamic_rank(8, inflate=0.4, deflate=0.8)
        >>> cost = cost_schedule(use, schedule, ["0"], 10)
        >>> phases = at_scale(model, use, cost, ProcessLayout(replicas=4))
        >>> [(one.cost.phase.start, one.traffic.all_reduced) for one in phases]
        [(0, 4096), (4, 16384), (8, 4096)]
    """
    moves = [None, *(_transition(use, a, b, layout, slots) for a, b in pairwise(cost.phases))]
    found: list[PhaseAtScale] = []
    for phase, move in zip(cost.phases, moves, strict=True):
        twin, _ = stand_in(model, [], phase.plan, meta=True)
        memory = process_memory(twin, layout, slots=slots)
        found.append(PhaseAtScale(phase, memory, step_traffic(twin, layout), move))
    return tuple(found)


def decomposition_flops(spec: WeightSpec, before: Form, after: Form) -> int:
    """The FLOPs that a weight's change of form takes, without those of the optimizer's state.

    Of a weight (n, m), n <= m, to rank r: its Gram matrix ``2 n^2 m``, the eigenvectors ``9 n^3``
    (Golub and Van Loan, "Matrix computations", 8.3), the projection ``2 n m r``. Of factors to
    smaller ones: two QR and the SVD of the core, ``4 (n + m) k^2 + 22 k^3`` with k the rank that
    they have. Factors are joined where the weight itself is needed. A new adapter takes none.

    Raises:
        ValueError: another decomposition than ``svd``.

    Example:
        >>> from dynarank.layers import WeightSpec
        >>> decomposition_flops(WeightSpec("weight", (64, 64)), FullRank(), LowRank(8))
        2949120
    """
    before, after = spec.resolve(before), spec.resolve(after)
    if spec.same_parameters(before, after):
        return 0
    joined = 0
    if not isinstance(before, FullRank):
        joined = spec.decomposition(before).join_flops(spec.shape, before.resolved_rank)
    if not isinstance(after, LowRank):
        return joined
    if after.decomposition != "svd":
        raise ValueError(
            f"the FLOPs of a {after.decomposition!r} decomposition are not known, only those of "
            f"'svd': it iterates until it fits; time it with dynarank.apply_plan on one layer"
        )
    n, m = sorted((spec.unit_shape[0], math.prod(spec.unit_shape[1:])))
    groups, rank = spec.geometry.groups, after.resolved_rank
    if (
        isinstance(before, LowRank)
        and before.decomposition == "svd"
        and before.resolved_rank > rank
    ):
        k = before.resolved_rank
        return groups * (4 * (n + m) * k**2 + 22 * k**3)
    return joined + groups * (2 * n**2 * m + 9 * n**3 + 2 * n * m * rank)


def _transition(
    use: ModelUse, old: PhaseCost, new: PhaseCost, layout: ProcessLayout, slots: int
) -> Transition:
    """What it takes to come from the forms of one phase to those of the next."""
    changed = [
        (one, old.plan.get(path, one.form), form)
        for path, form in new.plan.items()
        if not _same((one := use.layers[path]), old.plan.get(path, one.form), form)
    ]
    flops = sorted((decomposition_flops(u.spec, a, b) for u, a, b in changed), reverse=True)
    before = [_state_bytes(u, a, slots) for u, a, _ in changed]
    after = [_state_bytes(u, b, slots) for u, _, b in changed]
    return Transition(
        len(changed),
        sum(flops),
        len(flops[:: layout.processes]),
        sum(flops[:: layout.processes]),
        sum(before) if layout.shards > 1 else 0,
        sum(after) - sum(_kept_base(u, a, b) for u, a, b in changed),
        max(map(sum, zip(before, after, strict=True)), default=0),
    )


def _same(use: LayerUse, before: Form, after: Form) -> bool:
    return use.spec.same_parameters(use.spec.resolve(before), use.spec.resolve(after))


def _kept_base(use: LayerUse, before: Form, after: Form) -> int:
    """The bytes of a weight that becomes the base of an adapter as it is."""
    kept = isinstance(before, FullRank) and isinstance(after, Adapted)
    return math.prod(use.shape) * use.itemsize * kept


def _state_bytes(use: LayerUse, form: Form, slots: int) -> int:
    """The bytes of a layer's parameters and of their optimizer state."""
    trained, entries = use.parameters(form)
    return (entries + slots * trained) * use.itemsize
