"""One weight's change of form: the new parameters are computed and verified, then committed.

Preparing changes nothing. Committing only moves references, and every move can be undone.
"""

from __future__ import annotations

import math
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.decompositions import Factors, UnfitWeightError, as_unfit, precise
from dynarank.decompositions.truncation import ActivationStats, split_activation_aware
from dynarank.decompositions.zero_join import zero_join_factors
from dynarank.forms import Change, Form, FullRank, LowRank, same_weight
from dynarank.layers import RankedLayer, WeightSpec, own_parameters, ranked_class
from dynarank.surgery.sites import Site

__all__ = ["LOSSLESS", "Edit", "prepare_edit", "restore_on_exit"]

# The largest relative weight error of a change that keeps the function: rounding to the dtype once.
LOSSLESS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Edit:
    """A prepared change of one weight: its parameters before and after, by name."""

    site: Site
    change: Change  # what is reported of it
    old: dict[str, Parameter]
    new: dict[str, Parameter]
    shift: Tensor | None = None  # what is added to the module's bias

    @property
    def trained(self) -> dict[str, Parameter]:
        """The new parameters that train: all but the base."""
        return {name: p for name, p in self.new.items() if not self.site.spec.is_base(name)}

    def commit(self, undo: ExitStack) -> None:
        """Give each module its class, parameters and form; ``undo`` can take it all back."""
        for site in self.site.places:
            if site.reader is not None:
                _make_ranked(site.reader, undo)
            layer = _make_ranked(site.module, undo)
            _replace(own_parameters(layer), self.old, self.new)
            layer.set_form(site.spec.name, self.change.after)
        bias = own_parameters(self.site.module).get("bias")
        if bias is not None and self.shift is not None:
            undo.callback(bias.data.copy_, bias.detach().clone())
            bias.data.add_(self.shift.to(bias.device, bias.dtype))


def prepare_edit(site: Site, after: Form, activity: ActivationStats | None = None) -> Edit:
    """Compute and verify a weight's parameters in the form ``after``.

    Raises:
        ValueError: the weight is on the meta device or has gradient hooks, or the activation
            statistics are of another weight.
        UnfitWeightError: it is not finite, its decomposition fails, or a change that must keep the
            function would not.
    """
    old, before = site.parameters(), site.form
    assert before is not None
    if same_weight(before, after):
        return Edit(site, Change(site.path, before, after, 0.0), {}, {})
    _check_values(site.path, old)
    weight = _effective(site.spec, before, old)
    trains = any(p.requires_grad for p in site.trained())
    with as_unfit(f"layer {site.path!r} cannot be decomposed"):
        values, shift = _values(site, weight, after, activity)
    new = {
        name: Parameter(_like(value, old), requires_grad=trains and not site.spec.is_base(name))
        for name, value in zip(site.spec.parameter_names(after), values, strict=True)
    }
    norm, error = weight.norm().item(), (_effective(site.spec, after, new) - weight).norm().item()
    error = error / norm if norm > 0 else error
    dtype = next(iter(old.values())).dtype
    tolerance = math.inf if isinstance(after, LowRank) else LOSSLESS.get(dtype, 1e-2)
    if not error <= tolerance:
        raise UnfitWeightError(
            f"layer {site.path!r}: {before} -> {after} would change the weight by {error:.1e} "
            f"relative, above {tolerance:.0e} for {dtype}; the layer is left as it was"
        )
    return Edit(site, Change(site.path, before, after, error), old, new, shift)


def restore_on_exit(table: dict[Any, Any], undo: ExitStack) -> None:
    """Have ``undo`` give a dictionary the contents that it has now."""
    undo.callback(table.update, dict(table))
    undo.callback(table.clear)  # called before the update: last in, first out


def _make_ranked(module: nn.Module, undo: ExitStack) -> RankedLayer:
    """Make the module a ranked one, if it is not yet, with a table of parameters to write to."""
    undo.callback(setattr, module, "__class__", type(module))
    restore_on_exit(module.__dict__, undo)
    module.__dict__["_parameters"] = dict(own_parameters(module))  # the old one is kept to restore
    ranked = ranked_class(type(module))
    assert ranked is not None
    return ranked.from_plain(module)


def _replace(
    own: dict[str, Parameter | None], old: dict[str, Parameter], new: dict[str, Parameter]
) -> None:
    """Put the new parameters in the position of the first of the old ones."""
    items, first = list(own.items()), next((name for name in own if name in old), None)
    own.clear()
    for name, parameter in items:
        if name == first:
            own.update(new)
        elif name not in old:
            own[name] = parameter


def _values(
    site: Site, weight: Tensor, after: Form, activity: ActivationStats | None
) -> tuple[Factors, Tensor | None]:
    """New values, base first, and the change of the bias; ``weight`` is canonical, in fp64."""
    old, before, spec = next(iter(site.parameters().values())), site.form, site.spec
    if isinstance(after, FullRank):
        return (spec.from_canonical(weight),), None
    rank, decomposition = after.resolved_rank, spec.decomposition(after)
    if isinstance(after, LowRank):
        same = isinstance(before, LowRank) and before.decomposition == after.decomposition
        if same and activity is None:
            return decomposition.refactor(site.factors(), rank), None
        return split_activation_aware(decomposition, weight.to(old.dtype), rank, activity)
    # The base of what was full-rank is the old weight's own memory.
    base = old.detach() if isinstance(before, FullRank) else spec.from_canonical(weight)
    # Seeded by the run, the layer and the restart, so that no two adapters are the same.
    label = f"{site.path}#{after.restart}" if after.restart else site.path
    seed = torch.initial_seed() ^ zlib.crc32(label.encode())
    return (base, *zero_join_factors(decomposition.shapes(spec.shape, rank), seed)), None


def _effective(spec: WeightSpec, form: Form, parameters: dict[str, Parameter]) -> Tensor:
    """The canonical weight that the parameters stand for, in fp64."""
    return spec.to_canonical(spec.effective(form, {n: precise(p) for n, p in parameters.items()}))


def _check_values(path: str, parameters: dict[str, Parameter]) -> None:
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    for name, p in parameters.items():
        if p.is_meta:
            raise ValueError(f"layer {path!r}: its {name} is on the meta device and has no values")
        if any(getattr(p, kind, None) for kind in hooks):
            raise ValueError(
                f"layer {path!r}: its {name} has gradient hooks, which would be lost with it; "
                "remove them first and register them on the new parameters"
            )
        if not torch.isfinite(p).all():
            raise UnfitWeightError(f"layer {path!r}: its {name} holds NaN or infinite values")


def _like(tensor: Tensor, old: dict[str, Parameter]) -> Tensor:
    """The tensor in the dtype, on the device and in the memory format of the old parameters."""
    first, last = next(iter(old.values())), torch.channels_last
    tensor = tensor.detach().to(first.device, first.dtype)
    if tensor.ndim == 4 and any(
        p.ndim == 4 and p.is_contiguous(memory_format=last) and not p.is_contiguous()
        for p in old.values()
    ):
        return tensor.contiguous(memory_format=last)
    return tensor.contiguous()
