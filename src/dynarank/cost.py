"""What a layer costs in a form: parameters and FLOPs, exactly.

Legend: 1 multiply-accumulate = 2 FLOPs, as ``torch.utils.flop_counter`` counts; a training step is
one forward and one backward pass of one batch; N rows (batch times output positions).

With k = r(m + n) / (mn), relative to the full-rank layer's 6Nmn, where the input needs a gradient:

==============================  ======================================
form                            training FLOPs / full-rank
==============================  ======================================
low-rank                        k
adapted, two branches           2/3 + k
adapted, merged                 1 + r / N
adapted, auto                   the less of the two
==============================  ======================================

Only matrix products and convolutions are counted: additions, normalisations and the optimizer are
not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dynarank.decompositions import Geometry, get_decomposition, output_shape
from dynarank.forms import Form, FullRank, LowRank, Plan, execution_of, resolve_form
from dynarank.layers import RANKED, RankedLayer
from dynarank.survey import survey, weight_shape

__all__ = ["Flops", "LayerUse", "ModelUse", "count_flops", "form_flops", "form_parameters", "trace"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one batch: forward alone, and forward with backward."""

    forward: int = 0
    training: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.training + other.training)

    def __sub__(self, other: Flops) -> Flops:
        return Flops(self.forward - other.forward, self.training - other.training)


@dataclass(frozen=True)
class LayerUse:
    """How a model uses one layer.

    Args:
        shape: the weight's (out, in, *kernel).
        geometry: how the weight slides.
        form: the form the layer has.
        calls: for each call in a forward pass, the input's shape and whether it needs a gradient.
        trains: whether the layer trains at all.
    """

    shape: tuple[int, ...]
    geometry: Geometry
    form: Form
    calls: tuple[tuple[tuple[int, ...], bool], ...]
    trains: bool = True

    def flops(self, form: Form) -> Flops:
        """What the layer's calls cost in ``form``."""
        costs = (form_flops(self, resolve_form(form, self.shape), *call) for call in self.calls)
        return sum(costs, Flops())


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
        counts = [
            form_parameters(use.shape, plan.get(path, use.form), use.trains)
            for path, use in self.layers.items()
        ]
        trainable = sum(count[0] for count in counts) + self.other_trainable
        return trainable, sum(count[1] for count in counts) + self.other_total


def form_parameters(shape: Sequence[int], form: Form, trains: bool = True) -> tuple[int, int]:
    """Trainable and total entries of a weight (out, in, *kernel) in a form.

    Example:
        >>> form_parameters((16, 16, 3, 3), LowRank(8))
        (1280, 1280)
    """
    form = resolve_form(form, shape)
    whole = math.prod(shape)
    if isinstance(form, FullRank):
        return whole * trains, whole
    shapes = get_decomposition(form.decomposition).shapes(shape, cast(int, form.rank))
    factors = sum(math.prod(s) for s in shapes)
    base = 0 if isinstance(form, LowRank) else whole
    return factors * trains, base + factors


def form_flops(use: LayerUse, form: Form, input_shape: Sequence[int], input_grad: bool) -> Flops:
    """FLOPs of one call of a layer in a form; its rank must be resolved."""
    whole = _map_flops(input_shape, use.shape, use.geometry)
    if isinstance(form, FullRank):
        return Flops(whole, whole * (1 + input_grad + use.trains))
    factored = _chain_flops(use, form, input_shape, input_grad)
    if isinstance(form, LowRank):
        return factored
    rows = whole // (2 * math.prod(use.shape))
    if execution_of(form, use.shape, rows) == "two-branch":
        return Flops(whole, whole * (1 + input_grad)) + factored
    joining = 2 * math.prod(use.shape) * cast(int, form.rank)
    return Flops(
        whole + joining, whole * (1 + input_grad + use.trains) + joining * (1 + 2 * use.trains)
    )


def trace(model: nn.Module, sample: Any, loss: Callable[[Any], Tensor] | None = None) -> ModelUse:
    """Run one training step on a copy of the model without memory (meta tensors), and take notes.

    Fused attention is counted too, which FlopCounterMode leaves out when it runs on a CPU.

    Args:
        model: any model whose forward pass does not depend on values.
        sample: a batch: a tensor, or a tuple or dict of a forward pass's arguments.
        loss: from the model's output to a scalar; None: the sum of all its floating-point tensors.

    Returns:
        Everything needed to cost any plan for batches like this one.
    """
    ghost = copy.deepcopy(model).to("meta")
    ghost.train(model.training)
    calls: dict[str, list[tuple[tuple[int, ...], bool]]] = {}
    sites = [site for site in survey(model) if site.form is not None]
    for site in sites:
        layer = ghost.get_submodule(site.path)
        note = _note(calls.setdefault(site.path, []))
        layer.register_forward_pre_hook(note, with_kwargs=True)
    inputs = tree_map(_ghost, sample)
    counted = count_flops(ghost, inputs, loss)
    layers = {
        site.path: LayerUse(
            weight_shape(site.module),
            _geometry(site.module),
            cast(Form, site.form),
            tuple(calls[site.path]),
            any(
                p.requires_grad
                for n, p in site.module.named_parameters(recurse=False)
                if n != "bias"
            ),
        )
        for site in sites
    }
    known = sum((use.flops(use.form) for use in layers.values()), Flops())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    mine = [form_parameters(use.shape, use.form, use.trains) for use in layers.values()]
    return ModelUse(
        layers,
        counted - known,
        trainable - sum(count[0] for count in mine),
        total - sum(count[1] for count in mine),
    )


def count_flops(
    model: nn.Module, sample: Any, loss: Callable[[Any], Tensor] | None = None
) -> Flops:
    """What FlopCounterMode counts for one forward and backward pass of ``model`` on ``sample``."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        output = _call(model, sample)
        forward = counter.get_total_flops()
        scalar = (loss or _sum_all)(output)
        if scalar.requires_grad:
            scalar.backward()
        return Flops(forward, counter.get_total_flops())


def _ghost(value: Any) -> Any:
    """A tensor's shape and need of a gradient, without its memory."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("meta").requires_grad_(value.requires_grad)


def _call(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return model(**sample)
    return model(*sample) if isinstance(sample, tuple) else model(sample)


def _sum_all(output: Any) -> Tensor:
    tensors: Iterator[Tensor] = (
        leaf.sum()
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
    return cast(Tensor, sum(tensors))


def _note(calls: list[tuple[tuple[int, ...], bool]]) -> Callable[[nn.Module, Any, Any], None]:
    def note(_: nn.Module, inputs: Any, named: Any) -> None:
        x = inputs[0] if inputs else named["input"]
        calls.append((tuple(x.shape), x.requires_grad))

    return note


def _geometry(module: nn.Module) -> Geometry:
    """A layer's geometry, also of a plain layer: by the class it would have."""
    if isinstance(module, RankedLayer):
        return module.geometry
    return cast(Geometry, RANKED[type(module)].geometry.fget(module))  # type: ignore[attr-defined]


def _map_flops(input_shape: Sequence[int], weight: Sequence[int], geometry: Geometry) -> int:
    """2 N m n: twice the entries of the weight, for each of N output positions."""
    output = output_shape(input_shape, weight, geometry)
    return 2 * math.prod(output) * math.prod(weight[1:])


def _chain_flops(use: LayerUse, form: Form, input_shape: Sequence[int], input_grad: bool) -> Flops:
    """The factors one after another; all but the first are sure to need their input's gradient."""
    assert not isinstance(form, FullRank)
    decomposition = get_decomposition(form.decomposition)
    total, needs_grad = Flops(), input_grad
    shapes = decomposition.shapes(use.shape, cast(int, form.rank))
    for shape, geometry in zip(shapes, decomposition.stages(use.geometry), strict=True):
        forward = _map_flops(input_shape, shape, geometry)
        total += Flops(forward, forward * (1 + needs_grad + use.trains))
        input_shape = output_shape(input_shape, shape, geometry)
        needs_grad = needs_grad or use.trains
    return total
