"""One weight's change of form, prepared beside the model and then committed or undone.

Preparing computes the new parameters and verifies them; it touches nothing. Committing only moves
references, so it cannot fail half-way, and undoing moves them back.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.decompositions import UnfitWeightError, precise
from dynarank.decompositions.truncation import ActivationStats, split_activation_aware
from dynarank.forms import Adapted, Change, Form, FullRank, LowRank, same_weight
from dynarank.layers import RankedLayer, WeightSpec, own_parameters, ranked_class
from dynarank.surgery.sites import Site

__all__ = ["LOSSLESS", "Edit", "prepare_edit"]

# The largest relative weight error of a change that keeps the function: rounding to the dtype once.
LOSSLESS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Edit:
    """A prepared change of one weight: its parameters before and after, by name."""

    site: Site
    after: Form
    old: dict[str, Parameter]
    new: dict[str, Parameter]
    error: float
    shift: Tensor | None = None  # what is added to the module's bias
    _bias: tuple[Parameter, Tensor] | None = None  # the bias, and its values before
    _undo: list[tuple[nn.Module, dict[str, Any]]] = field(
        default_factory=list[tuple[nn.Module, dict[str, Any]]]
    )

    @property
    def path(self) -> str:
        """The weight's path."""
        return self.site.path

    @property
    def before(self) -> Form:
        """The form the weight had when the edit was prepared."""
        assert self.site.form is not None
        return self.site.form

    @property
    def change(self) -> Change:
        """What is reported of it."""
        return Change(self.path, self.before, self.after, self.error)

    @property
    def restarts(self) -> bool:
        """Whether only the adapter is another, its factors of the same shapes."""
        one, two = self.before, self.after
        if not (isinstance(one, Adapted) and isinstance(two, Adapted)):
            return False
        return one != two and same_weight(replace(one, restart=two.restart), two)

    def commit(self) -> None:
        """Give every module of the weight its new class, parameters and form."""
        for site in (self.site, *self.site.tied):
            for module in filter(None, (site.reader, site.module)):
                own = dict(own_parameters(module))
                state = {"class": type(module), "dict": dict(module.__dict__), "own": own}
                self._undo.append((module, state))
                _make_ranked(module)
            _replace(own_parameters(site.module), self.old, self.new)
            _make_ranked(site.module).set_form(site.spec.name, self.after)
        bias = own_parameters(self.site.module).get("bias")
        if bias is not None and self.shift is not None:
            self._bias = bias, bias.detach().clone()
            bias.data.add_(self.shift.to(bias.device, bias.dtype))

    def undo(self) -> None:
        """Take back ``commit``; nothing if it was not called."""
        if self._bias is not None:
            self._bias[0].data.copy_(self._bias[1])
        for module, state in reversed(self._undo):
            module.__class__ = state["class"]
            module.__dict__.clear()
            module.__dict__.update(state["dict"])
            own_parameters(module).clear()
            own_parameters(module).update(state["own"])


def prepare_edit(site: Site, after: Form, activity: ActivationStats | None = None) -> Edit:
    """Compute and verify a weight's parameters in the form ``after``.

    Args:
        site: the weight.
        after: the form it is to get.
        activity: how its outputs vary, if that is known: what a truncation keeps.

    Raises:
        ValueError: the weight is on the meta device or not real floating point, or the activity is
            of another weight.
        UnfitWeightError: it is not finite, its decomposition fails, or a change that must keep the
            function would not.
    """
    old, before = site.parameters(), site.form
    assert before is not None
    if same_weight(before, after):
        return Edit(site, after, {}, {}, 0.0)
    _check_values(site.path, old)
    weight = _effective(site.spec, before, old)
    trains = any(p.requires_grad for name, p in old.items() if not site.spec.is_base(name))
    like = next(iter(old.values()))
    tensors, shift = _tensors(site, weight, after, old, activity)
    new = {
        name: Parameter(
            _like(tensor, like, old), requires_grad=trains and not site.spec.is_base(name)
        )
        for name, tensor in tensors.items()
    }
    error = _relative_error(weight, _effective(site.spec, after, new))
    tolerance = math.inf if isinstance(after, LowRank) else LOSSLESS.get(like.dtype, 1e-2)
    if not error <= tolerance:
        raise UnfitWeightError(
            f"layer {site.path!r}: {before} -> {after} would change the weight by {error:.1e} "
            f"relative, above {tolerance:.0e} for {like.dtype}; the layer is left as it was"
        )
    return Edit(site, after, old, new, error, shift)


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


def _tensors(
    site: Site,
    weight: Tensor,
    after: Form,
    old: dict[str, Parameter],
    activity: ActivationStats | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The new parameters' values by name, base first, and the change of the bias.

    ``weight`` is canonical, in fp64.
    """
    spec, names = site.spec, site.spec.parameter_names(after)
    full = spec.from_canonical(weight)
    if isinstance(after, FullRank):
        return {names[0]: full}, None
    rank, decomposition = after.resolved_rank, spec.decomposition(after)
    if isinstance(after, LowRank):
        same = isinstance(site.form, LowRank) and site.form.decomposition == after.decomposition
        if same and activity is None:
            return dict(zip(names, decomposition.refactor(site.factors(), rank), strict=True)), None
        dtype = next(iter(old.values())).dtype
        factors, shift = split_activation_aware(decomposition, weight.to(dtype), rank, activity)
        return dict(zip(names, factors, strict=True)), shift
    # The base of what was full-rank is the old weight's own memory.
    base = next(iter(old.values())).detach() if isinstance(site.form, FullRank) else full
    label = f"{site.path}#{after.restart}" if after.restart else site.path
    factors = _zero_adapter(label, decomposition.shapes(spec.shape, rank))
    return dict(zip(names, (base, *factors), strict=True)), None


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
    for name, p in parameters.items():
        if p.is_meta:
            raise ValueError(f"layer {path!r}: its {name} is on the meta device and has no values")
        if _has_hooks(p):
            raise ValueError(
                f"layer {path!r}: its {name} has gradient hooks, which would be lost with it; "
                "remove them first and register them on the new parameters"
            )
        if not p.is_floating_point():
            raise ValueError(f"layer {path!r}: its {name} is {p.dtype}; real floating point only")
        if not torch.isfinite(p).all():
            raise UnfitWeightError(f"layer {path!r}: its {name} holds NaN or infinite values")


def _has_hooks(parameter: Parameter) -> bool:
    """Whether hooks wait for the parameter's gradient."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(parameter, name, None) for name in names)


def _relative_error(before: Tensor, after: Tensor) -> float:
    norm = before.norm().item()
    difference = (after - before).norm().item()
    return difference / norm if norm > 0 else difference


def _like(tensor: Tensor, like: Tensor, old: dict[str, Parameter]) -> Tensor:
    """The tensor in the dtype, on the device and in the memory format of the old parameters."""
    tensor = tensor.detach().to(like.device, like.dtype)
    four = tensor.ndim == 4 and any(_channels_last(p) for p in old.values())
    return tensor.contiguous(memory_format=torch.channels_last if four else torch.contiguous_format)


def _channels_last(parameter: Tensor) -> bool:
    last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return last and not parameter.is_contiguous()
