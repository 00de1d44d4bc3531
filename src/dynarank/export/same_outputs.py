"""Whether two models compute the same, on one batch: outputs of any kind, compared by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynarank.layers.running import call_model, preserve_state

__all__ = ["allowance", "check_same", "difference", "tensors_in"]

# Of the largest entry: a hundred times what a chain of products of ordinary size is off by.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
_LESS = 5e-2  # other dtypes


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output, with names: of a tensor, tuple, dict, dataclass or nested ones.

    Example:
        >>> [name for name, _ in tensors_in({"logits": torch.ones(1), "states": (torch.ones(1),)})]
        ['logits', 'states.0']
    """
    if isinstance(value, Tensor):
        yield name or "output", value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        own = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
        yield from tensors_in(own, name)
    elif isinstance(value, Mapping):
        for key, entry in cast("Mapping[Any, Any]", value).items():
            yield from tensors_in(entry, f"{name}.{key}".lstrip("."))
    elif isinstance(value, tuple | list):
        for i, entry in enumerate(cast("list[Any]", value)):
            yield from tensors_in(entry, f"{name}.{i}".lstrip("."))


def difference(one: Any, other: Any) -> tuple[float, str]:
    """The largest difference of two outputs, and which output has it.

    Differences are relative to the largest entry of that tensor. Infinite if shapes or names differ
    or one has NaN where the other has not.
    """
    ours, theirs = dict(tensors_in(one)), dict(tensors_in(other))
    if ours.keys() != theirs.keys():
        return float("inf"), ", ".join(sorted(ours.keys() ^ theirs.keys()))
    return max(((_difference(ours[n], theirs[n]), n) for n in ours), default=(0.0, ""))


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    exact = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
    a, b = (x.detach().cpu().to(exact) for x in (one, other))
    same = torch.isclose(a, b, 0, 0, equal_nan=True)  # infinities too: of a mask, say
    if bool(same.all()):
        return 0.0
    size = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else torch.zeros(())
    error = float((a - b)[~same].abs().max()) / max(float(size), 1e-30)
    return error if error == error else float("inf")


def check_same(model: nn.Module, plain: nn.Module, batch: Any) -> None:
    """Raise ValueError if the models differ on the batch, in evaluation; say at which layer."""
    expected = _run(model, batch)
    try:
        got = _run(plain, batch)
    except Exception as error:
        raise ValueError(_told(error, plain)) from error
    off, name = difference(got, expected)
    allowed = allowance(expected)
    if off > allowed:
        raise ValueError(
            f"the plain model computes something else: {name} is off by {off:.1e}, more than "
            f"{allowed:g}{_first_that_differs(model, plain, batch, allowed)}"
        )


def allowance(output: Any) -> float:
    """The difference that rounding may make of an output."""
    real = (x.dtype.to_real() for _, x in tensors_in(output))
    return max((_TOLERANCES.get(one, _LESS) for one in real if one.is_floating_point), default=0.0)


def _run(model: nn.Module, batch: Any) -> Any:
    with preserve_state(model, training=False, grad=False, eager=True):
        return call_model(model, batch)


def _first_that_differs(model: nn.Module, plain: nn.Module, batch: Any, allowed: float) -> str:
    """The first module whose outputs differ; empty if none does while they are looked at."""
    ours, theirs = (_by_path(one, batch) for one in (model, plain))
    found = (p for p, y in ours.items() if p in theirs and difference(theirs[p], y)[0] > allowed)
    path = next(found, "")
    return f", first at layer {path!r}" if path else ""


def _by_path(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The output of each module in one pass, in the order in which they end."""
    seen: dict[str, Any] = {}
    hooks = [m.register_forward_hook(_keep(seen, path)) for path, m in model.named_modules()]
    try:
        _run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _keep(seen: dict[str, Any], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.setdefault(path, output)

    return hook


def _told(error: Exception, plain: nn.Module) -> str:
    """Why the plain model does not run, by the layer's name if the error tells."""
    paths = {module: path for path, module in plain.named_modules()}
    layer = paths.get(getattr(error, "obj", None) if isinstance(error, AttributeError) else None)  # type: ignore[arg-type]
    if layer is None:
        return f"the plain model does not run on this batch ({type(error).__name__}: {error})"
    name = getattr(error, "name", "an attribute")
    return (
        f"the model reads {name} of layer {layer!r}, which factors in a row do not have: leave the "
        "layer out with layers=..., to have it merged"
    )
