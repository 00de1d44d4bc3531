"""The executions of a form and their costs; ``"auto"`` runs the cheapest one.

Legend: 1 multiply-accumulate = 2 FLOPs; W (n, m) as a matrix, N rows, r the rank; J = the FLOPs of
``join`` (2mnr for an SVD), k = r(m + n) / (mn).

Training FLOPs relative to the full-rank layer's 6Nmn, if the input needs a gradient (SVD):

==============================  ==========================================================
low-rank, factored              k                  (+ r / 3n with ``recompute``)
low-rank, joined                1 + r / N
adapted, two branches           2/3 + k
adapted, merged, thin           2/3 + 2k/3 + r/(3N)
adapted, merged, projected      1 + r / N
==============================  ==========================================================

A merged weight that is not saved for the backward pass is joined twice: another r / (3N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dynarank.decompositions import Geometry
from dynarank.decompositions.geometry import output_shape
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers.weight import WeightSpec

__all__ = ["Call", "Execution", "Flops", "choose_execution", "executions", "map_flops"]

# The merged weight is saved for the backward pass if joining it again would cost more than this
# share of the layer; below it, saving memory is worth more.
_REJOINING_IS_CHEAP = 0.02


@dataclass(frozen=True)
class Flops:
    """The FLOPs of one batch: of the forward pass, and of forward and backward together."""

    forward: int = 0
    training: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.training + other.training)

    def __sub__(self, other: Flops) -> Flops:
        return Flops(self.forward - other.forward, self.training - other.training)


@dataclass(frozen=True)
class Call:
    """One use of a weight in a forward pass.

    Args:
        shape: the shape of the input to which the weight is applied, padding included.
        geometry: the geometry of the weight on this input.
        input_grad: whether the input needs a gradient.
        trains: whether the weight needs a gradient.
        rows: the range (start, stop) of the weight's outputs that are used; None: all.
        device: the type of the layer's device.
        lookup: whether rows of the weight are looked up; a weight that an embedding and an output
            layer share is used in both ways.
        again: whether it repeats a call in the backward pass (activation checkpointing): it costs
            training, and no forward pass.
        output: the only one of the module's outputs that it is needed for, by position; None: each.
        reached: whether what it computes gets a gradient. Without one (it is detached, or no part
            of the loss) there is no backward pass; the execution is chosen before that is known.
    """

    shape: tuple[int, ...]
    geometry: Geometry
    input_grad: bool
    trains: bool
    rows: tuple[int, int] | None = None
    device: str = "cpu"
    lookup: bool = False
    again: bool = False
    output: int | None = None
    reached: bool = True

    def own_executions(self, spec: WeightSpec, form: Form) -> list[Execution] | None:
        """The executions, if they differ from those of a plain multiplication; else None."""
        return None


@dataclass(frozen=True)
class Execution:
    """A way to compute a form, with its cost.

    Args:
        name: ``"full-rank"``, ``"factored"``, ``"joined"``, ``"merged"`` or ``"two-branch"``.
        flops: its FLOPs.
        thin: for a merged product: whether the gradients of the factors are computed without the
            whole weight gradient, see :class:`dynarank.layers.merged.Merging`.
        keep: for a merged product: whether the merged weight is saved for the backward pass.
        overhead: other costs of a training step, converted to FLOPs by their time; a forward pass
            alone has a third of it.
    """

    name: str
    flops: Flops
    thin: bool = False
    keep: bool = False
    overhead: int = 0

    def worth(self, grad: bool) -> int:
        """The cost to compare: FLOPs and overhead, with or without the backward pass."""
        return (
            self.flops.training + self.overhead if grad else self.flops.forward + self.overhead // 3
        )


def choose_execution(spec: WeightSpec, form: Form, call: Call) -> Execution:
    """The execution that the form specifies; for ``"auto"``, the one with the fewest FLOPs.

    If nothing needs a gradient, only the forward pass counts. The form's rank must be resolved.

    Example:
        >>> from dynarank.decompositions import Geometry
        >>> spec = WeightSpec("weight", (64, 64))
        >>> calls = [Call((rows, 64), Geometry(), True, True) for rows in (16, 512)]
        >>> [choose_execution(spec, Adapted(8), call).name for call in calls]
        ['two-branch', 'merged']
    """
    grad = call.input_grad or call.trains
    best, *others = executions(spec, form, call)
    for other in others:  # torch.compile does not follow min(..., key=...) into a list of objects
        best = other if other.worth(grad) < best.worth(grad) else best
    return best


def executions(spec: WeightSpec, form: Form, call: Call) -> list[Execution]:
    """All executions of ``call`` that the form allows."""
    if call.rows is not None:
        return executions(spec.rows(*call.rows), form, replace(call, rows=None))
    if (own := call.own_executions(spec, form)) is not None:
        return own
    if call.lookup:
        return _lookups(spec, form, call)
    if isinstance(form, FullRank):
        whole = map_flops(call.shape, spec.shape, call.geometry)
        return [Execution("full-rank", Flops(whole, whole * (1 + call.input_grad + call.trains)))]
    makers = _LOW_RANK if isinstance(form, LowRank) else _ADAPTED
    chosen = makers if form.execution == "auto" else {form.execution: makers[form.execution]}
    return [one for make in chosen.values() for one in make(spec, form, call)]


def map_flops(input_shape: Sequence[int], weight: Sequence[int], geometry: Geometry) -> int:
    """The forward FLOPs of a linear layer or convolution, 2 N m n at N output positions.

    For a transposed convolution, N is the number of input positions.
    """
    shape = input_shape if geometry.transposed else output_shape(input_shape, weight, geometry)
    dims = len(weight) - 2
    rows = math.prod(shape[:-1] if not dims else (*shape[: -dims - 1], *shape[-dims:]))
    return 2 * rows * math.prod(weight)


def _chain(spec: WeightSpec, form: LowRank | Adapted, call: Call) -> list[int]:
    """The forward FLOPs of each factor."""
    found: list[int] = []
    shape: Sequence[int] = call.shape
    stages = spec.stages(form, call.geometry)
    for weight, geometry in zip(spec.factor_shapes(form), stages, strict=True):
        found.append(map_flops(shape, weight, geometry))
        shape = output_shape(shape, weight, geometry)
    return found


def _factored_flops(chain: Sequence[int], form: LowRank | Adapted, call: Call) -> Flops:
    """The FLOPs of the factors in turn; all but the first always need their input's gradient."""
    inner = call.input_grad or call.trains
    again = sum(chain[:-1]) if form.recompute and inner else 0
    backward = sum(f * (inner + call.trains) for f in chain) - chain[0] * (inner - call.input_grad)
    return Flops(sum(chain), sum(chain) + backward + again)


def _join_flops(spec: WeightSpec, form: LowRank | Adapted) -> int:
    return spec.decomposition(form).join_flops(spec.shape, _rank(form))


def _rank(form: LowRank | Adapted) -> int:
    return form.resolved_rank


def _factored(spec: WeightSpec, form: LowRank, call: Call) -> list[Execution]:
    return [Execution("factored", _factored_flops(_chain(spec, form, call), form, call))]


def _joined(spec: WeightSpec, form: LowRank, call: Call) -> list[Execution]:
    whole, join = map_flops(call.shape, spec.shape, call.geometry), _join_flops(spec, form)
    backward = whole * (call.input_grad + call.trains) + 2 * join * call.trains
    return [Execution("joined", Flops(whole + join, whole + join + backward))]


def _two_branch(spec: WeightSpec, form: Adapted, call: Call) -> list[Execution]:
    whole = map_flops(call.shape, spec.shape, call.geometry)
    adapter = _factored_flops(_chain(spec, form, call), form, call)
    return [Execution("two-branch", Flops(whole, whole * (1 + call.input_grad)) + adapter)]


def _merged(spec: WeightSpec, form: Adapted, call: Call) -> list[Execution]:
    whole, join = map_flops(call.shape, spec.shape, call.geometry), _join_flops(spec, form)
    if not (call.input_grad or call.trains):  # nothing is saved for a backward pass
        return [Execution("merged", Flops(whole + join, whole + join))]
    keep = not form.recompute and join > _REJOINING_IS_CHEAP * 3 * whole
    forward = whole + join
    backward = (whole + join * (not keep)) * call.input_grad
    if not call.trains:
        return [Execution("merged", Flops(forward, forward + backward), True, keep)]
    chain = _chain(spec, form, call)
    thin = sum(chain[:-1]) + sum(chain) + sum(chain[1:])
    projected = whole + spec.decomposition(form).pull_flops(spec.shape, _rank(form))
    return [
        Execution("merged", Flops(forward, forward + backward + gradients), gradients == thin, keep)
        for gradients in (thin, projected)
    ]


def _lookups(spec: WeightSpec, form: Form, call: Call) -> list[Execution]:
    """Executions of a lookup: looking up rows is free, multiplying them by the factors is not."""
    if isinstance(form, FullRank):
        return [Execution("full-rank", Flops())]
    sizes = [math.prod(shape) for shape in spec.factor_shapes(form)[:-1]]
    each = 2 * math.prod(call.shape) * sum(sizes), _join_flops(spec, form)
    names = ("factored", "joined") if isinstance(form, LowRank) else ("two-branch", "merged")
    found = [
        Execution(name, Flops(flops, flops * (1 + 2 * call.trains)))
        for name, flops in zip(names, each, strict=True)
    ]
    return [one for one in found if form.execution in ("auto", one.name)]


_Makers = dict[str, Callable[[WeightSpec, Any, Call], list[Execution]]]
_LOW_RANK: _Makers = {"factored": _factored, "joined": _joined}
_ADAPTED: _Makers = {"two-branch": _two_branch, "merged": _merged}
