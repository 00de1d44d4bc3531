"""One weight's change of form: the new parameters are computed and verified, then committed.

Preparing changes nothing. Committing only moves references (and adds to a bias), and how to undo a
move is registered before it is made: an exception at any line, Ctrl-C included, leaves no half.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.decompositions import Factors, UnfitWeightError, all_finite, precise
from dynarank.decompositions.truncation import ActivationStats, split_activation_aware
from dynarank.decompositions.zero_join import zero_join_factors
from dynarank.distributed.fsdp2 import Resharding
from dynarank.forms import Adapted, Change, Form, FullRank, LowRank, same_weight
from dynarank.layers import RankedLayer, WeightSpec, own_parameters, ranked_class
from dynarank.layers.own_forward import set_class
from dynarank.surgery.bias import bias_shift, usable_statistics
from dynarank.surgery.settings import new_parameters
from dynarank.surgery.sites import Site

__all__ = [
    "LOSSLESS",
    "Edit",
    "InShards",
    "check_names",
    "check_replaceable",
    "check_values_known",
    "like_old",
    "prepare_edit",
    "restore_module_on_exit",
    "restore_on_exit",
]

# The largest relative weight error of a change that keeps the function: rounding to the dtype once.
LOSSLESS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class InShards:
    """What a change of a weight that ``fully_shard`` shards has beside its new shards.

    Args:
        resharding: what puts the shards into the old ones' places.
        norms: those of the whole factors.
        states: the optimizers' states of the new parameters: by the id of their table, and by name.
    """

    resharding: Resharding
    norms: tuple[float, ...] = ()
    states: Mapping[int, Mapping[str, dict[str, Any]]] = field(default_factory=dict[Any, Any])

    def reverse(self, norms: tuple[float, ...]) -> InShards:
        """What puts the old shards back, whose factors had these norms."""
        return InShards(self.resharding.reverse(), norms)


@dataclass(frozen=True)
class Edit:
    """A prepared change of one weight: its parameters before and after, by name."""

    site: Site
    change: Change  # what is reported of it
    old: dict[str, Parameter]
    new: dict[str, Parameter]
    shift: Tensor | None = None  # what is added to the module's bias
    bias_left: str = ""  # why the bias stays, though the activation statistics would move it
    shards: InShards | None = None  # if fully_shard shards the weight
    made_by: str = ""  # the name of the change, if its values are not loaded afterwards

    @property
    def trained(self) -> dict[str, Parameter]:
        """The new parameters that train: all but the base."""
        return {name: p for name, p in self.new.items() if not self.site.spec.is_base(name)}

    def commit(self, undo: ExitStack) -> None:
        """Give each module its class, parameters and form; ``undo`` can take it all back."""
        frozen, norms = self.site.frozen_factors, self.norms or self.site.factor_norms
        for site in self.site.places:
            if site.reader is not None:
                _make_ranked(site.reader, undo)
            layer = _make_ranked(site.module, undo)
            _replace(own_parameters(layer), self.old, self.new)
            made_by = self.made_by if self.new else layer.made_by.get(site.spec.name, "")
            layer.set_form(site.spec.name, self.change.after, frozen, norms, made_by)
        bias = own_parameters(self.site.module).get("bias")
        if bias is not None and self.shift is not None:
            undo.callback(bias.data.copy_, bias.detach().clone())
            bias.data.add_(self.shift)
        if self.shards is not None:
            self.shards.resharding.commit(undo)

    @property
    def norms(self) -> tuple[float, ...]:
        """Those of the new parameters that train, as they are noted of the layer."""
        if self.shards is not None:
            return self.shards.norms
        return tuple(
            float(p.detach().double().norm()) for p in self.trained.values() if not p.is_meta
        )


def prepare_edit(
    site: Site, after: Form, activity: ActivationStats | None = None, seed: int | None = None
) -> Edit:
    """Compute and verify a weight's parameters in the form ``after``.

    Args:
        site: the weight.
        after: its new form.
        activity: the activation statistics for a truncation.
        seed: of new adapters; None: ``torch.initial_seed()``.

    Raises:
        ValueError: the weight is on the meta device, or the activation statistics are of another.
        UnfitWeightError: it has gradient hooks or is not finite, its decomposition fails, a new
            value overflows its dtype, or a change that must keep the function would not.
    """
    old, before = site.parameters(), site.form
    assert before is not None
    if same_weight(before, after):
        return Edit(site, Change(site.path, before, after, 0.0), {}, {})
    check_replaceable(site.path, old)
    _check_values(site.path, old)
    check_names(site, after)
    weight = site.exact()
    activity, bias_left = usable_statistics(site, after, activity)
    seed = torch.initial_seed() if seed is None else seed
    values, shift = _values(site, weight, after, activity, seed)
    names = zip(site.spec.parameter_names(after), values, strict=True)
    new = new_parameters(site, {name: like_old(value, name, site, after) for name, value in names})
    shift = None if shift is None else bias_shift(site, shift)
    return Edit(site, _measured(site, after, weight, new), old, new, shift, bias_left)


def restore_on_exit(table: dict[Any, Any], undo: ExitStack) -> None:
    """Have ``undo`` give a dictionary the contents that it has now."""
    undo.callback(table.update, dict(table))
    undo.callback(table.clear)  # called before the update: last in, first out


def restore_module_on_exit(module: nn.Module, undo: ExitStack) -> None:
    """Have ``undo`` give a module the class, attributes and parameters that it has now."""
    undo.callback(set_class, module, type(module))
    restore_on_exit(module.__dict__, undo)
    module.__dict__["_parameters"] = dict(own_parameters(module))  # the old one is kept to restore


def _make_ranked(module: nn.Module, undo: ExitStack) -> RankedLayer:
    """Make the module a ranked one, if it is not yet, with a table of parameters to write to."""
    restore_module_on_exit(module, undo)
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
    site: Site, weight: Tensor, after: Form, activity: ActivationStats | None, seed: int
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
        stored = torch.promote_types(old.dtype, torch.float32)  # bf16 would round a merged weight
        return split_activation_aware(decomposition, weight.to(stored), rank, activity)
    # The base of what was full-rank is the old weight's own memory.
    base = old.detach() if isinstance(before, FullRank) else spec.from_canonical(weight)
    # Seeded by the run, the layer and the restart, so that no two adapters are the same.
    label = f"{site.path}#{after.restart}" if after.restart else site.path
    own = seed ^ zlib.crc32(label.encode())
    return (base, *zero_join_factors(decomposition.shapes(spec.shape, rank), own)), None


def _effective(spec: WeightSpec, form: Form, parameters: Mapping[str, Tensor]) -> Tensor:
    """The canonical weight that the parameters stand for, in fp64."""
    return spec.to_canonical(spec.effective(form, {n: precise(p) for n, p in parameters.items()}))


def check_names(site: Site, after: Form) -> None:
    """Raise ValueError if the module has something else under a new parameter's name."""
    new = set(site.spec.parameter_names(after)) - {*site.parameters(), site.spec.name}
    for place in site.places:
        if taken := sorted(name for name in new if hasattr(place.module, name)):
            raise ValueError(
                f"layer {place.path!r} has an attribute {taken[0]!r} of its own, which is the name "
                f"of a parameter in the form {after}; rename it"
            )


def _check_values(path: str, parameters: dict[str, Parameter]) -> None:
    """Raise ValueError for parameters that have no values, UnfitWeightError for NaN."""
    check_values_known(path, parameters)
    for name, p in parameters.items():
        if not all_finite(p):
            raise UnfitWeightError(f"layer {path!r}: its {name} holds NaN or infinite values")


def check_values_known(path: str, parameters: dict[str, Parameter]) -> None:
    """Raise ValueError for parameters that have no values."""
    for name, p in parameters.items():
        if p.is_meta:
            raise ValueError(f"layer {path!r}: its {name} is on the meta device and has no values")


def check_replaceable(path: str, parameters: dict[str, Parameter]) -> None:
    """Raise UnfitWeightError for parameters with which something would be lost."""
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    for name, p in parameters.items():
        why = ""
        if not p.is_leaf:
            why = "is computed from other tensors"
        elif any(getattr(p, kind, None) for kind in hooks):
            why = (
                "has gradient hooks, which would be lost with it; remove them first and register "
                "them on the new parameters: under a RankScheduler by a callback, in its "
                "before_change and after_change"
            )
        if why:
            said = f"layer {path!r}: its {name} {why}"
            raise UnfitWeightError(said, {path: said})


def _measured(site: Site, after: Form, weight: Tensor, new: dict[str, Parameter]) -> Change:
    """The change and its errors.

    Raises:
        UnfitWeightError: a value overflows, or a change that must keep the function would not.
    """
    before, spec = site.form, site.spec
    assert before is not None
    name = f"layer {site.path!r}: {before} -> {after}"
    for parameter in new.values():
        if not all_finite(parameter):
            raise UnfitWeightError(
                f"{name} has values too large for {parameter.dtype}, the dtype of the layer; "
                "convert it to fp32 or bf16 first; it is left as it was"
            )
    lost = 0.0 if _keeps_weight(site, after, new) else _distance(site, after, weight, new)
    whole = weight.norm().item() if lost else 0.0
    error = lost / whole if whole > 0 else lost
    tolerance = max(LOSSLESS.get(p.dtype, 1e-2) for p in new.values())
    if isinstance(after, LowRank):
        return Change(site.path, before, after, error)
    if not error <= tolerance:
        raise UnfitWeightError(
            f"{name} would change the weight by {error:.1e} relative, above {tolerance:.0e} for "
            f"{next(iter(new.values())).dtype}; the layer is left as it was"
        )
    if not isinstance(before, Adapted):
        return Change(site.path, before, after, error)
    base = spec.to_canonical(precise(spec.base(before, site.parameters())))
    update = (weight - base).norm().item()
    return Change(site.path, before, after, error, lost / update if update > 0 else 0.0)


def _keeps_weight(site: Site, after: Form, new: Mapping[str, Parameter]) -> bool:
    """Whether the old weight itself is the base of the new form, under an adapter of zeros."""
    base, *factors = new.values()
    if not (isinstance(site.form, FullRank) and isinstance(after, Adapted)):
        return False
    (old,) = site.parameters().values()
    return base.data_ptr() == old.data_ptr() and not bool(factors[-1].any())


def _distance(site: Site, after: Form, weight: Tensor, new: Mapping[str, Parameter]) -> float:
    """How far the weight of the new parameters is from the old one."""
    return (_effective(site.spec, after, new) - weight).norm().item()


def like_old(
    value: Tensor, name: str, site: Site, after: Form, dtype: torch.dtype | None = None
) -> Tensor:
    """The value as its predecessor is stored: dtype (if none is given), device, memory format.

    The whole weight and the base follow the old base, the factors the old factors: they may differ,
    as in fp32 adapters on a bf16 model.
    """
    old, last = list(site.parameters().values()), _CHANNELS_LAST.get(value.ndim)
    whole = isinstance(after, FullRank) or site.spec.is_base(name)
    model = old[0] if whole else old[-1]
    value = value.detach().to(model.device, dtype or model.dtype)
    value = value.clone() if value.is_inference() else value  # which autograd could not save
    if last is not None and any(map(_is_channels_last, old)):
        return _laid_out(value, last)
    return _laid_out(value, torch.contiguous_format)


def _is_channels_last(p: Tensor) -> bool:
    """Whether it is channels-last by its strides, those of sides of 1 included.

    They alone tell the format of CP's factors, each of which is the same memory in either.
    """
    if (last := _CHANNELS_LAST.get(p.ndim)) is None:
        return False
    return _strides(p, torch.contiguous_format) != p.stride() == _strides(p, last)


def _laid_out(value: Tensor, layout: torch.memory_format) -> Tensor:
    """The value in this memory format, strides of sides of 1 included."""
    value = value.contiguous(memory_format=layout)
    return value.as_strided(value.shape, _strides(value, layout))


def _strides(tensor: Tensor, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta", memory_format=layout).stride()
