"""Seconds that a weight costs in a form, measured on the device at hand.

What FLOPs do not tell: small layers are bound by memory or by overhead, and there factors are no
faster, or slower, than the weight itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dynarank.cost import LayerUse, ModelUse
from dynarank.decompositions import apply, linear_map
from dynarank.forms import Form, FullRank, LowRank
from dynarank.layers import Call, WeightSpec, choose_way

__all__ = ["layer_seconds", "layer_timer"]

_PAUSE = 0.2  # seconds spent on one form, at most, once it has run three times


def layer_timer(
    use: ModelUse, device: torch.device | str, *, channels_last: bool = False
) -> Callable[[str, Form], float]:
    """A function ``(path, form) -> seconds`` of one training step, each kind of layer timed once.

    Args:
        use: the trace of a batch of the size that is to be timed.
        device: where to run; under autocast if that is on when the function is called.
        channels_last: the memory format of four-dimensional inputs.

    Example:
        >>> from dynarank.cost import trace
        >>> use = trace(nn.Sequential(nn.Linear(8, 8)), torch.ones(2, 8))
        >>> layer_timer(use, "cpu")("0", FullRank()) > 0
        True
    """
    known: dict[tuple[LayerUse, Form], float] = {}

    def seconds(path: str, form: Form) -> float:
        key = use.layers[path], use.layers[path].spec.resolve(form)
        if key not in known:
            known[key] = layer_seconds(*key, torch.device(device), channels_last=channels_last)
        return known[key]

    return seconds


def layer_seconds(
    use: LayerUse, form: Form, device: torch.device, *, channels_last: bool = False
) -> float:
    """The least of several runs of a layer's calls, forward and backward, in a resolved form.

    Raises:
        ValueError: an adapted form, or a weight whose rows are looked up: not timed here.
    """
    if use.spec.lookup or not isinstance(form, FullRank | LowRank):
        raise ValueError(f"{form} of a weight {use.shape} is not timed; give the seconds yourself")
    steps = [_step(use.spec, form, call, device, channels_last) for call in use.calls]

    def once() -> float:
        begun = time.perf_counter()
        for step in steps:
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    once()  # allocations, kernels chosen
    return min(_runs(once))


def _runs(once: Callable[[], float]) -> Iterator[float]:
    """At least three, more while they are quick."""
    spent = count = 0
    while count < 3 or (spent < _PAUSE and count < 30):
        seconds = once()
        spent, count = spent + seconds, count + 1
        yield seconds


def _step(
    spec: WeightSpec, form: FullRank | LowRank, call: Call, device: torch.device, last: bool
) -> Callable[[], None]:
    """One call, forward and backward, on made-up values."""
    four = len(call.shape) == 4 and last and spec.dims == 2
    layout = torch.channels_last if four else torch.contiguous_format
    x = torch.randn(call.shape, device=device).contiguous(memory_format=layout)
    x.requires_grad_(call.input_grad)
    shapes = (spec.shape,) if isinstance(form, FullRank) else spec.factor_shapes(form)
    weights = tuple(torch.randn(s, device=device, requires_grad=call.trains) for s in shapes)
    wanted = [t for t in (x, *weights) if t.requires_grad]

    def step() -> None:
        with torch.set_grad_enabled(bool(wanted)):
            y = _product(spec, form, call, x, weights)
        if wanted:
            torch.autograd.grad(y, wanted, torch.ones_like(y))

    return step


def _product(
    spec: WeightSpec,
    form: FullRank | LowRank,
    call: Call,
    x: Tensor,
    weights: tuple[Tensor, ...],
) -> Tensor:
    if isinstance(form, FullRank):
        return linear_map(x, weights[0], call.geometry)
    if choose_way(spec, form, call).name == "factored":
        return apply(x, weights, spec.stages(form, call.geometry))
    return linear_map(x, spec.decomposition(form).join(weights), call.geometry)
