"""The exact number of parameters and FLOPs of a model under a plan.

Legend: 1 multiply-accumulate = 2 FLOPs, as ``torch.utils.flop_counter`` counts; a training step is
one forward and one backward pass of one batch. The costs of the forms are in ``layers.execution``.

Only matrix products and convolutions are counted: additions, normalizations and the optimizer are
not.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from dynarank.forms import Form, FullRank, LowRank, Plan
from dynarank.layers import Call, Flops, WeightSpec, choose_execution, ranked_class, readers
from dynarank.layers.running import call_model, forward_arguments
from dynarank.surgery.sites import Site, survey

__all__ = ["Flops", "LayerUse", "ModelUse", "count_flops", "form_parameters", "run_batch", "trace"]


@dataclass(frozen=True)
class LayerUse:
    """The uses of one weight in a training step.

    Args:
        spec: the description of the weight.
        form: its form.
        calls: its uses in a forward pass.
        trains: whether it is trainable.
    """

    spec: WeightSpec
    form: Form
    calls: tuple[Call, ...]
    trains: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, (out, in / groups, *kernel)."""
        return self.spec.shape

    def flops(self, form: Form) -> Flops:
        """The FLOPs of its calls in ``form``."""
        resolved = self.spec.resolve(form)
        return sum(
            (choose_execution(self.spec, resolved, call).flops for call in self.calls), Flops()
        )

    def parameters(self, form: Form) -> tuple[int, int]:
        """The number of trainable and of all entries in ``form``."""
        return form_parameters(self.spec, form, self.trains)


@dataclass(frozen=True)
class ModelUse:
    """The trace of a training step: the uses of each weight, and the cost of everything else."""

    layers: Mapping[str, LayerUse]
    rest: Flops
    other_trainable: int
    other_total: int

    def flops(self, plan: Plan) -> Flops:
        """The FLOPs of one batch under ``plan``; layers not in the plan keep their form."""
        costs = (use.flops(plan.get(path, use.form)) for path, use in self.layers.items())
        return sum(costs, self.rest)

    def parameters(self, plan: Plan) -> tuple[int, int]:
        """The number of trainable and of all parameters under ``plan``."""
        counts = [use.parameters(plan.get(path, use.form)) for path, use in self.layers.items()]
        trainable = sum(count[0] for count in counts) + self.other_trainable
        return trainable, sum(count[1] for count in counts) + self.other_total


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
    """Run one training step on a meta copy of the model and record how each weight is used.

    Fused attention is counted too, which FlopCounterMode misses on CPUs.

    Args:
        model: any model whose forward pass does not depend on tensor values.
        sample: a batch: a tensor, a tuple or list of positional arguments of the forward pass, or a
            dict of keyword arguments; see :func:`dynarank.layers.running.forward_arguments`.
        loss: a function from the model's output to a scalar; None: the sum of all its
            floating-point tensors.

    Returns:
        The trace, from which the cost of any plan can be computed for batches of this shape.
    """
    meta_copy = copy.deepcopy(model).to("meta")
    meta_copy.train(model.training)
    sites = [site for site in survey(model) if site.form is not None]
    calls: dict[str, list[Call]] = {site.path: [] for site in sites}
    _record_calls(meta_copy, sites, calls)
    to_meta = partial(_to_meta, known={})
    args, named = tree_map(to_meta, forward_arguments(model, sample), is_leaf=_is_packed)
    counted = _count(lambda: meta_copy(*args, **named), loss)
    layers = {
        site.path: LayerUse(
            site.spec,
            cast(Form, site.form),
            tuple(calls[site.path]),
            any(p.requires_grad for p in site.parameters().values()),
        )
        for site in sites
    }
    known = sum((use.flops(use.form) for use in layers.values()), Flops())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    mine = [use.parameters(use.form) for use in layers.values()]
    return ModelUse(
        layers,
        counted - known,
        trainable - sum(count[0] for count in mine),
        total - sum(count[1] for count in mine),
    )


def count_flops(
    model: nn.Module, sample: Any, loss: Callable[[Any], Tensor] | None = None
) -> Flops:
    """Count the FLOPs of one forward and backward pass of ``model`` with FlopCounterMode.

    One error is corrected: it counts the weight gradient of a grouped convolution once per group.
    """
    return _count(lambda: call_model(model, sample), loss)


def _count(forward: Callable[[], Any], loss: Callable[[Any], Tensor] | None) -> Flops:
    from torch.utils.flop_counter import FlopCounterMode

    mapping = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.enable_grad(), counter:
        output = forward()
        flops = counter.get_total_flops()
        scalar = (loss or _sum_all)(output)
        if scalar.requires_grad:
            scalar.backward()
        return Flops(flops, counter.get_total_flops())


def _convolution_backward_flops(
    dy: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    *rest: Any,
    out_shape: object = None,
    **named: Any,
) -> int:
    """The backward FLOPs of a convolution: those of forward for each of its two gradients."""
    transposed, wanted = rest[4], rest[7]
    positions = (x if transposed else dy)[2:]
    forward = 2 * dy[0] * math.prod(positions) * math.prod(weight)
    return forward * (wanted[0] + wanted[1])


def _to_meta(value: Any, known: dict[int, Tensor]) -> Any:
    """Tensors replaced by meta tensors with the same ``requires_grad``; shared ones stay shared."""
    if isinstance(value, PackedSequence):
        data = cast(Tensor, _to_meta(value.data, known))  # batch_sizes are kept: they are a shape
        return PackedSequence(data, value.batch_sizes, *(_to_meta(v, known) for v in value[2:]))
    if not isinstance(value, Tensor):
        return value
    if id(value) not in known:
        known[id(value)] = value.detach().to("meta").requires_grad_(value.requires_grad)
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


def _record_calls(
    meta_copy: nn.Module, sites: Sequence[Site], calls: dict[str, list[Call]]
) -> None:
    """Register hooks that record each module's uses of its weights, tied ones under one path."""
    paths: dict[nn.Module, dict[str, str]] = {}
    parents, devices = readers(meta_copy), dict[nn.Module, str]()
    for site in sites:
        for one in site.places:
            module, name = meta_copy.get_submodule(one.module_paths[0]), one.spec.name
            if module in parents:  # it is never called; its parent uses its weight
                module, name = parents[module], f"{one.module_paths[0].rpartition('.')[2]}.{name}"
            paths.setdefault(module, {})[name] = site.path
            devices[module] = next(iter(one.parameters().values())).device.type
    for module, names in paths.items():
        hook = _record(names, calls, devices[module])
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _record(
    names: Mapping[str, str], calls: dict[str, list[Call]], device: str
) -> Callable[[nn.Module, Any, Any], None]:
    def record(module: nn.Module, inputs: Any, named: Any) -> None:
        ranked = ranked_class(type(module))
        assert ranked is not None
        bound = inspect.signature(module.forward).bind(*inputs, **named)
        bound.apply_defaults()
        for name, found in ranked.calls(module, bound.arguments).items():
            if name in names:
                calls[names[name]] += [replace(call, device=device) for call in found]

    return record
