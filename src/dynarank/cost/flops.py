"""What a model costs under a plan: parameters and FLOPs, exactly.

Legend: 1 multiply-accumulate = 2 FLOPs, as ``torch.utils.flop_counter`` counts; a training step is
one forward and one backward pass of one batch. What a form costs is in ``layers.execution``.

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
    """How a model uses one weight.

    Args:
        spec: the weight.
        form: the form it has.
        calls: its uses in a forward pass.
        trains: whether it trains at all.
    """

    spec: WeightSpec
    form: Form
    calls: tuple[Call, ...]
    trains: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in / groups, *kernel)."""
        return self.spec.shape

    def flops(self, form: Form) -> Flops:
        """What its calls cost in ``form``."""
        resolved = self.spec.resolve(form)
        return sum(
            (choose_execution(self.spec, resolved, call).flops for call in self.calls), Flops()
        )

    def parameters(self, form: Form) -> tuple[int, int]:
        """Trainable and total entries in ``form``."""
        return form_parameters(self.spec, form, self.trains)


@dataclass(frozen=True)
class ModelUse:
    """How a batch runs through a model: its layers, and what everything else costs."""

    layers: Mapping[str, LayerUse]
    rest: Flops
    other_trainable: int
    other_total: int

    def flops(self, plan: Plan) -> Flops:
        """FLOPs of one batch under ``plan``; layers it does not name stay in their form."""
        costs = (use.flops(plan.get(path, use.form)) for path, use in self.layers.items())
        return sum(costs, self.rest)

    def parameters(self, plan: Plan) -> tuple[int, int]:
        """Trainable and total parameters under ``plan``."""
        counts = [use.parameters(plan.get(path, use.form)) for path, use in self.layers.items()]
        trainable = sum(count[0] for count in counts) + self.other_trainable
        return trainable, sum(count[1] for count in counts) + self.other_total


def form_parameters(spec: WeightSpec, form: Form, trains: bool = True) -> tuple[int, int]:
    """Trainable and total entries of a weight in a form.

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

    Fused attention is counted too, which FlopCounterMode leaves out when it runs on a CPU.

    Args:
        model: any model whose forward pass does not depend on values.
        sample: a batch: a tensor, a tuple or list of positional arguments of the forward pass, or a
            dict of keyword arguments; see :func:`dynarank.layers.running.forward_arguments`.
        loss: from the model's output to a scalar; None: the sum of all its floating-point tensors.

    Returns:
        Everything needed to cost any plan for batches like this one.
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
    """What FlopCounterMode counts for one forward and backward pass of ``model`` on ``sample``.

    With one correction: it counts a grouped convolution's weight gradient once for each group.
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
    """As much as forward for each of the gradients of input and weight."""
    transposed, wanted = rest[4], rest[7]
    positions = (x if transposed else dy)[2:]
    forward = 2 * dy[0] * math.prod(positions) * math.prod(weight)
    return forward * (wanted[0] + wanted[1])


def _to_meta(value: Any, known: dict[int, Tensor]) -> Any:
    """A tensor's shape and need of a gradient, without its memory; passed twice, it stays one."""
    if isinstance(value, PackedSequence):
        data = cast(Tensor, _to_meta(value.data, known))  # batch_sizes stay: they are the shape
        return PackedSequence(data, value.batch_sizes, *(_to_meta(v, known) for v in value[2:]))
    if not isinstance(value, Tensor):
        return value
    if id(value) not in known:
        known[id(value)] = value.detach().to("meta").requires_grad_(value.requires_grad)
    return known[id(value)]


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def run_batch(model: nn.Module, sample: Any, loss: Callable[[Any], Tensor] | None = None) -> Tensor:
    """A batch's loss, or the sum of all the model's floating-point outputs."""
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
    """Have every module record its uses of its weights, tied ones under their site's path."""
    paths: dict[nn.Module, dict[str, str]] = {}
    parents, devices = readers(meta_copy), dict[nn.Module, str]()
    for site in sites:
        for one in site.places:
            module, name = meta_copy.get_submodule(one.module_paths[0]), one.spec.name
            if module in parents:  # it is not called, its parent knows
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
