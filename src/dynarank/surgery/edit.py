"""One weight's change of form, prepared beside the model, then committed.

Preparing computes the new parameters and verifies them; it touches nothing. Committing only moves
references, so it cannot fail half-way, and what it moves can be moved back.
"""

from __future__ import annotations

import math
import zlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.decompositions import Factors, UnfitWeightError, precise
from dynarank.decompositions.truncation import ActivationStats, split_activation_aware
from dynarank.forms import Adapted, Change, Form, FullRank, LowRank, same_weight
from dynarank.layers import RankedLayer, WeightSpec, own_parameters, ranked_class
from dynarank.surgery.sites import Site

__all__ = ["LOSSLESS", "Edit", "prepare_edit"]

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
    def restarts(self) -> bool:
        """Whether only the adapter is another, its factors of the same shapes."""
        one, two = self.change.before, self.change.after
        if not (isinstance(one, Adapted) and isinstance(two, Adapted)):
            return False
        return one != two and same_weight(replace(one, restart=two.restart), two)

    def commit(self, undo: ExitStack) -> None:
        """Give each module its new class, parameters and form; ``undo`` gets what takes it back."""
        for site in self.site.places:
            for module in filter(None, (site.reader, site.module)):
                undo.callback(_restore, module, type(module), dict(module.__dict__))
                module.__dict__["_parameters"] = dict(own_parameters(module))
                _make_ranked(module)
            _replace(own_parameters(site.module), self.old, self.new)
            _make_ranked(site.module).set_form(site.spec.name, self.change.after)
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
    values, shift = _values(site, weight, after, activity)
    new = {
        name: Parameter(_like(value, old), requires_grad=trains and not site.spec.is_base(name))
        for name, value in zip(site.spec.parameter_names(after), values, strict=True)
    }
    error = _relative_error(weight, _effective(site.spec, after, new))
    dtype = next(iter(old.values())).dtype
    tolerance = math.inf if isinstance(after, LowRank) else LOSSLESS.get(dtype, 1e-2)
    if not error <= tolerance:
        raise UnfitWeightError(
            f"layer {site.path!r}: {before} -> {after} would change the weight by {error:.1e} "
            f"relative, above {tolerance:.0e} for {dtype}; the layer is left as it was"
        )
    return Edit(site, Change(site.path, before, after, error), old, new, shift)


def _restore(module: nn.Module, cls: type[nn.Module], state: dict[str, Any]) -> None:
    module.__class__ = cls
    module.__dict__.clear()
    module.__dict__.update(state)


def _replace(
    own: dict[str, Parameter | None], old: dict[str, Parameter], new: dict[str, Parameter]
) -> None:
    """Put the new parameters where the first of the old ones was."""
    items = list(own.items())
    own.clear()
    placed = False
    for name, parameter in items:
        if name not in old:
            own[name] = parameter
        elif not placed:
            own.update(new)
            placed = True


def _make_ranked(module: nn.Module) -> RankedLayer:
    """Make the module a ranked one, every weight full-rank; nothing if it is one."""
    ranked = ranked_class(type(module))
    assert ranked is not None
    return ranked.from_plain(module)


def _values(
    site: Site, weight: Tensor, after: Form, activity: ActivationStats | None
) -> tuple[Factors, Tensor | None]:
    """The new parameters' values, base first, and the change of the bias.

    ``weight`` is canonical, in fp64.
    """
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
    label = f"{site.path}#{after.restart}" if after.restart else site.path
    return (base, *_zero_adapter(label, decomposition.shapes(spec.shape, rank))), None


def _zero_adapter(label: str, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """Glorot-uniform factors, the last one zero, so that their join is zero.

    Drawn from a generator of their own, seeded by the run's seed and a label of the layer's path
    and the restart: the global random state is untouched, and two adapters differ.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(label.encode()))
    drawn = [_glorot(shape, generator) for shape in shapes[:-1]]
    return (*drawn, torch.zeros(shapes[-1], dtype=torch.float64))


def _glorot(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    positions = math.prod(shape[2:])
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * positions))
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * bound


def _effective(spec: WeightSpec, form: Form, parameters: dict[str, Parameter]) -> Tensor:
    """The canonical weight that the parameters stand for, in fp64."""
    return spec.to_canonical(
        spec.effective(form, {name: precise(p) for name, p in parameters.items()})
    )


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


def _relative_error(before: Tensor, after: Tensor) -> float:
    norm = before.norm().item()
    difference = (after - before).norm().item()
    return difference / norm if norm > 0 else difference


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
