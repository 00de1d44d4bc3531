"""Whether an averaged copy of a model (EMA, SWA) is one of the model as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dynarank.layers import RankedLayer
from dynarank.surgery.problem import Problem, listed, shape

__all__ = ["average_problems"]

_INSIDE = ("module", "ema_model", "averaged_model", "ema", "model")
_PREFIXES = ("module.", "_orig_mod.")
_WAY = "make a new average of the model, or bring it to the same forms by apply_plan"


def average_problems(model: nn.Module, ema: Any) -> Iterator[Problem]:
    """I5: names, shapes and forms of the average are the model's. I11: so are the names' prefixes.

    Args:
        model: without its wrappers.
        ema: a copy of the model; an object that has one (``AveragedModel``) or a list of tensors
            (``shadow_params``); a dictionary of tensors.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(ema, Mapping):
        tensors = {n: v for n, v in ema.items() if isinstance(v, Tensor) and n != "n_averaged"}
        yield from _of_tensors(model, tensors, wrapped="n_averaged" in ema)
    elif isinstance(inner := _copy_in(model, ema), nn.Module):
        found = _differing(_shapes(model.named_parameters()), _shapes(inner.named_parameters()))
        yield from found or _forms(model, inner)
    elif isinstance(shadow := getattr(ema, "shadow_params", None), Sequence):
        kept = [shape(p) for p in shadow]
        both = [[shape(p) for p in model.parameters() if p.requires_grad or f] for f in (0, 1)]
        if kept not in both:
            yield Problem("I5", "ema", f"its tensors do not have the parameters' shapes: {_WAY}")
    else:
        raise TypeError(
            "ema is a copy of the model, an object with one (AveragedModel), or a dictionary of "
            f"tensors, got {type(ema).__name__}"
        )


def _copy_in(model: nn.Module, ema: Any) -> Any:
    """The copy of the model, looking through what holds it."""
    seen = set[int]()
    while type(ema) is not type(model) and id(ema) not in seen:
        seen.add(id(ema))
        inner = (getattr(ema, name, None) for name in _INSIDE)
        ema = next((one for one in inner if isinstance(one, nn.Module)), ema)
    return ema


def _of_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], *, wrapped: bool
) -> Iterator[Problem]:
    own = {name: v for name, v in model.state_dict().items() if isinstance(v, Tensor)}
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors) and {*own} - {*tensors}:
            if not wrapped:
                text = f"its keys begin with {prefix}, the model's do not: remove the prefix"
                yield Problem("I11", "ema", text)
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    needed = {n for n, p in model.named_parameters() if p.requires_grad}
    known = _shapes((n, v) for n, v in own.items() if n in tensors or n in needed)
    yield from _differing(known, _shapes(tensors.items()))


def _differing(
    own: Mapping[str, tuple[int, ...]], kept: Mapping[str, tuple[int, ...]]
) -> list[Problem]:
    problems: list[Problem] = []
    if missing := own.keys() - kept.keys():
        problems.append(Problem("I5", "ema", f"it does not have {listed(missing)}: {_WAY}"))
    if foreign := kept.keys() - own.keys():
        text = f"it has {listed(foreign)}, the model does not: {_WAY}"
        problems.append(Problem("I5", "ema", text))
    for name in own.keys() & kept.keys():
        if own[name] != kept[name]:
            text = f"it has the shape {kept[name]} in the average, {own[name]} in the model: {_WAY}"
            problems.append(Problem("I5", name, text))
    return problems


def _forms(model: nn.Module, copy: nn.Module) -> list[Problem]:
    """Layers of the same parameters in another form: another alpha, decomposition or restart."""
    others = dict(copy.named_modules())
    return [
        Problem("I5", path, f"it is {dict(theirs)} in the average, {dict(forms)} here: {_WAY}")
        for path, module in model.named_modules()
        if (theirs := _record(others[path])) != (forms := _record(module))
    ]


def _record(module: nn.Module) -> Mapping[str, Any]:
    forms = module.forms if isinstance(module, RankedLayer) else {}
    return {name: form for name, form in forms.items() if module.has_factors(name)}  # type: ignore[union-attr]


def _shapes(named: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {name: shape(tensor) for name, tensor in named}
