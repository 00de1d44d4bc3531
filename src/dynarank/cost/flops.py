"""The exact number of parameters and FLOPs of a model under a plan.

Legend: 1 multiply-accumulate = 2 FLOPs, as ``torch.utils.flop_counter`` counts; a training step is
one forward and one backward pass of one batch. The costs of the forms are in ``layers.execution``.

Only matrix products and convolutions are counted: additions, normalizations and the optimizer are
not.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from dynarank.cost.call_record import CallRecord, recorded_calls
from dynarank.cost.counter import count_step
from dynarank.forms import BudgetKind, Form, FullRank, LowRank, Plan
from dynarank.layers import Call, Flops, WeightSpec, choose_execution
from dynarank.layers.running import call_model, forward_arguments, preserve_state
from dynarank.surgery.sites import Site, survey

__all__ = [
    "Flops",
    "LayerUse",
    "ModelUse",
    "count_flops",
    "form_parameters",
    "run_batch",
    "share_of",
    "trace",
    "weights_only",
]

_NOT_EXACT = (
    "the FLOPs of {0} in other forms are an estimate: it or its loss takes gradients itself "
    "(torch.autograd.grad), a function gives None as a gradient, or the `calls` of a layer are not "
    "what it computes; to be exact, apply a plan to a copy and use dynarank.cost.count_flops"
)
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional, by keyword


@dataclass(frozen=True)
class LayerUse:
    """The uses of one weight in a training step.

    Args:
        spec: the description of the weight.
        form: its form.
        calls: its uses in a forward pass.
        trains: whether it is trainable.
        itemsize: the bytes of one entry.
    """

    spec: WeightSpec
    form: Form
    calls: tuple[Call, ...]
    trains: bool = True
    itemsize: int = 4

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, (out, in / groups, *kernel)."""
        return self.spec.shape

    def flops(self, form: Form) -> Flops:
        """The FLOPs of its calls in ``form``."""
        resolved = self.spec.resolve(form)
        return sum((_call_flops(self.spec, resolved, call) for call in self.calls), Flops())

    def parameters(self, form: Form) -> tuple[int, int]:
        """The number of trainable and of all entries in ``form``."""
        return form_parameters(self.spec, form, self.trains)

    def cost(self, kind: BudgetKind, form: Form) -> int:
        """Training FLOPs, parameters or bytes of the weight in ``form``."""
        if kind == "flops":
            return self.flops(form).training
        entries = self.parameters(form)[1]
        return entries if kind == "params" else entries * self.itemsize


@dataclass(frozen=True)
class ModelUse:
    """The trace of a training step: the uses of each weight, and the cost of everything else."""

    layers: Mapping[str, LayerUse]
    rest: Flops
    other_trainable: int
    other_total: int
    other_bytes: int = 0

    def rest_cost(self, kind: BudgetKind) -> int:
        """The training FLOPs, parameters or bytes of everything but the weights."""
        costs = {"flops": self.rest.training, "params": self.other_total, "bytes": self.other_bytes}
        return costs[kind]

    def shares(self, paths: Collection[str]) -> tuple[float, float]:
        """The training FLOPs of these layers at full rank and of all else, relative to the model's.

        The model's are those at full rank; all else is as it is now.
        """
        own = sum(self.layers[path].flops(FullRank()).training for path in paths)
        whole = self.flops(dict.fromkeys(paths, FullRank())).training
        full = self.flops(dict.fromkeys(self.layers, FullRank())).training
        return share_of(own, full), share_of(whole - own, full, 0.0)

    def flops(self, plan: Plan) -> Flops:
        """The FLOPs of one batch under ``plan``; layers not in the plan keep their form."""
        costs = (use.flops(plan.get(path, use.form)) for path, use in self.layers.items())
        return sum(costs, self.rest)

    def parameters(self, plan: Plan) -> tuple[int, int]:
        """The number of trainable and of all parameters under ``plan``."""
        counts = [use.parameters(plan.get(path, use.form)) for path, use in self.layers.items()]
        trainable = sum(count[0] for count in counts) + self.other_trainable
        return trainable, sum(count[1] for count in counts) + self.other_total


def _call_flops(spec: WeightSpec, form: Form, call: Call) -> Flops:
    cost = choose_execution(spec, form, call).flops
    training = cost.training if call.reached else cost.forward
    return Flops(0 if call.again else cost.forward, training)


def share_of(part: float, whole: float, of_nothing: float = 1.0) -> float:
    """``part / whole``; a model without matrix products costs in each form what it costs in any."""
    return part / whole if whole else of_nothing


def form_parameters(spec: WeightSpec, form: Form, trains: bool = True) -> tuple[int, int]:
    """The number of trainable and of all entries of a weight in a form.

    Example:
        >>> form_parameters(WeightSpec("weight", (16, 16, 3, 3)), LowRank(8))
        (1280, 1280)
    """
    form, whole = spec.resolve(form), math.prod(spec.shape)
    if isinstance(form, FullRank):
        return whole * trains, whole
    factors = sum(math.prod(shape) for shape in spec.factor_shapes(form))
    base = 0 if isinstance(form, LowRank) else whole
    return factors * trains, base + factors


def trace(model: nn.Module, sample: Any, loss: Callable[[Any], Tensor] | None = None) -> ModelUse:
    """Run one training step on a copy of the model and record how each weight is used.

    The step runs on a meta copy, which computes nothing. A model that meta tensors do not allow
    (its forward pass reads values, as of an attention mask, or makes tensors on a fixed device)
    takes the step with real tensors on its own device instead, with the same counts. This needs
    the memory of a second copy of the parameters, of their gradients and of the activations, with
    attention scores in full. The model, its gradients and the random state do not change. A model
    that cannot be copied takes the step itself: what it writes besides its buffers remains.

    Fused attention and recurrent kernels are counted too, which FlopCounterMode misses. Where
    tensor values decide how much is computed, the counts are those of this batch. A call that the
    loss does not depend on costs its forward pass alone. What gradients cost in another form is not
    known if the model or the loss takes them itself (``torch.autograd.grad``): there is a warning.

    Args:
        model: any model that runs on the sample.
        sample: a batch: a tensor, a tuple or list of positional arguments of the forward pass, or a
            dict of keyword arguments; see :func:`dynarank.layers.running.forward_arguments`.
        loss: a function from the model's output to a scalar; None: the sum of all its
            floating-point tensors.

    Returns:
        The trace, from which the cost of any plan can be computed for batches of this shape.

    Raises:
        Exception: what the model itself raises on the sample.

    Example:
        >>> use = trace(nn.Sequential(nn.Linear(64, 64)), torch.ones(2, 64))
        >>> use.flops({}).training, use.flops({"0": LowRank(8)}).training
        (32768, 10240)
    """
    sites = [site for site in survey(model) if site.form is not None]
    arguments = forward_arguments(model, sample)
    with torch.inference_mode(False), preserve_state(model, eager=True):
        counted, record = _recorded_step(model, sites, arguments, loss or _sum_all)
    use = _use(model, sites, record.calls, counted)
    if record.inexact or not 0 <= use.rest.forward <= use.rest.training:
        warnings.warn(_NOT_EXACT.format(type(model).__name__), stacklevel=2)
    return use


def weights_only(model: nn.Module) -> ModelUse:
    """The weights of a model without a pass: its parameters and bytes are known, FLOPs are zero.

    Example:
        >>> weights_only(nn.Sequential(nn.Linear(64, 64))).parameters({"0": LowRank(8)})
        (1088, 1088)
    """
    sites = [site for site in survey(model) if site.form is not None]
    return _use(model, sites, {site.path: [] for site in sites}, Flops())


def _use(
    model: nn.Module, sites: Sequence[Site], calls: Mapping[str, list[Call]], counted: Flops
) -> ModelUse:
    layers = {
        site.path: LayerUse(
            site.spec,
            cast(Form, site.form),
            tuple(calls[site.path]),
            any(p.requires_grad for p in site.parameters().values()),
            max(p.itemsize for p in site.parameters().values()),
        )
        for site in sites
    }
    known = sum((use.flops(use.form) for use in layers.values()), Flops())
    mine = [use.parameters(use.form) for use in layers.values()]
    parameters = list(model.parameters())
    return ModelUse(
        layers,
        counted - known,
        sum(p.numel() for p in parameters if p.requires_grad) - sum(count[0] for count in mine),
        sum(p.numel() for p in parameters) - sum(count[1] for count in mine),
        sum(p.numel() * p.itemsize for p in parameters)
        - sum(use.cost("bytes", use.form) for use in layers.values()),
    )


def count_flops(
    model: nn.Module, sample: Any, loss: Callable[[Any], Tensor] | None = None
) -> Flops:
    """Count the FLOPs of one forward and backward pass of ``model`` with FlopCounterMode.

    The pass runs on the model itself, where it is, and leaves no trace in parameters' gradients,
    buffers or random state. Three gaps of FlopCounterMode are filled: grouped convolutions,
    grouped matrix products, and fused attention and recurrent kernels, which run as matrix
    products here.

    Args:
        model: any model.
        sample: a batch, as in :func:`trace`.
        loss: a function from the model's output to a scalar; None: the sum of all its
            floating-point tensors.

    Example:
        >>> count_flops(nn.Linear(8, 4), torch.ones(2, 8))
        Flops(forward=128, training=256)
    """
    arguments = forward_arguments(model, sample)
    with torch.inference_mode(False), preserve_state(model, eager=True):
        args, named = _own_tensors(arguments)
        return count_step(model, lambda: model(*args, **named), loss or _sum_all)


def _recorded_step(
    model: nn.Module, sites: Sequence[Site], arguments: _Arguments, loss: Callable[[Any], Tensor]
) -> tuple[Flops, CallRecord]:
    """Count a training step and record the calls, on the first of these where it runs.

    A meta copy, a copy with real tensors, or, if the model cannot be copied, the model itself.
    """
    try:
        twin = copy.deepcopy(model).to("meta")
        return _record_step(twin, sites, _own_tensors(arguments, "meta"), loss)
    except Exception:  # whatever the model does that meta tensors do not allow
        if any(p.is_meta for p in model.parameters()):
            raise
    try:
        twin = copy.deepcopy(model)
    except Exception:  # it keeps something that cannot be copied, or there is no memory for it
        twin = model
    return _record_step(twin, sites, _own_tensors(arguments), loss)


def _record_step(
    twin: nn.Module, sites: Sequence[Site], arguments: _Arguments, loss: Callable[[Any], Tensor]
) -> tuple[Flops, CallRecord]:
    args, named = arguments
    with recorded_calls(twin, sites) as record:

        def whole_loss(output: Any) -> Tensor:
            scalar = loss(output)
            record.begin_backward()
            return scalar

        return count_step(twin, lambda: twin(*args, **named), whole_loss), record


def _own_tensors(arguments: _Arguments, device: str | None = None) -> _Arguments:
    """Copies of the tensors, on ``device`` or where they are, with no history."""
    own = partial(_own_tensor, device=device, known={})
    return cast(_Arguments, tree_map(own, arguments, is_leaf=_is_packed))


def _own_tensor(value: Any, device: str | None, known: dict[int, Tensor]) -> Any:
    """A copy of a tensor with the same ``requires_grad``; shared ones stay shared."""
    if isinstance(value, PackedSequence):
        data, *order = (_own_tensor(v, device, known) for v in (value.data, *value[2:]))
        return PackedSequence(data, value.batch_sizes, *order)  # batch_sizes: a shape, on the CPU
    if not isinstance(value, Tensor):
        return value
    if id(value) not in known:
        own = value.detach().to(device) if device else value.detach().clone()
        known[id(value)] = own.requires_grad_(value.requires_grad)
    return known[id(value)]


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def run_batch(model: nn.Module, sample: Any, loss: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The loss of a batch, or the sum of all floating-point outputs of the model."""
    return (loss or _sum_all)(call_model(model, sample))


def _sum_all(output: Any) -> Tensor:
    tensors: Iterator[Tensor] = (
        leaf.sum()
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
    return cast(Tensor, sum(tensors))
