"""Whether the loss of a batch is a weighted mean of the losses of its parts, by the gradients.

With loss L of a batch, L_p and w_p of its parts, it is if g = sum_p w_p g_p for the gradients g of
L and g_p of L_p. Losses tell less: where all examples have nearly one loss, as the log V of V
tokens at the start of training, any weights w that sum to 1 seem right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.layers.running import preserve_state

__all__ = ["errors_of_mean"]

_MOST_VALUES = 2**24  # of gradients, of the smallest parameters: they are held three times
_NOISE = 1e-3  # of two gradients of one batch; kernels of a GPU that add in any order give 1e-6
_DRAWS = 16


def errors_of_mean(
    loss: Callable[[Any], Tensor],
    model: nn.Module,
    whole: Any,
    parts: Sequence[Any],
    weights: Sequence[Sequence[float]],
) -> list[float] | None:
    """By how much the weighted mean of the parts misses the whole, for each choice of weights.

    It is ||g - sum_p w_p g_p|| / max_p ||g_p||, in evaluation mode. If the model draws numbers
    there too, means of losses are compared in place of gradients, and what the draws explain is 0.

    Args:
        loss: of a batch, a scalar.
        model: the model whose loss it is; its state is given back.
        whole: a batch.
        parts: batches that it consists of.
        weights: for each choice, the weights of the parts.

    Returns:
        An error for each choice; None: nothing can be said, there is no gradient or it is not
        finite.

    Raises:
        Exception: what the model or the loss raises.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> errors_of_mean(lambda b: model(b).sum(), model, x, x.split(1), [[1, 1], [0.5, 0.5]])
        [0.0, 0.707...]
    """
    chosen = _parameters(model)
    with preserve_state(model, training=False, grad=True, eager=True), _differentiable(model):
        if not chosen or not torch.isfinite(value := loss(whole)):
            return None
        found = _gradients(value, chosen)
        again = _gradients(loss(whole), chosen)
        if _norm(_difference(found, [again], [1.0])) > _NOISE * _norm(found):
            return _errors_on_average(loss, whole, parts, weights)
        del again
        of_parts = [_gradients(loss(part), chosen) for part in parts]
    scale = max(map(_norm, of_parts))
    if not scale or not math.isfinite(scale):
        return None
    return [_norm(_difference(found, of_parts, row)) / scale for row in weights]


def _parameters(model: nn.Module) -> Sequence[Tensor]:
    """Those that are trained, the smallest first, as many as are to be held."""
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=Tensor.numel)
    held = list(accumulate(p.numel() for p in trained))
    return trained[: max(1, sum(values <= _MOST_VALUES for values in held))]


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def _difference(
    whole: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], weights: Sequence[float]
) -> Generator[Tensor]:
    for one, *others in zip(whole, *parts, strict=True):
        yield one.float() - sum(w * g.float() for w, g in zip(weights, others, strict=True))


def _norm(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _errors_on_average(
    loss: Callable[[Any], Tensor],
    whole: Any,
    parts: Sequence[Any],
    weights: Sequence[Sequence[float]],
) -> list[float] | None:
    """The relative errors of mean losses, less four standard errors of the draws."""
    with torch.no_grad():
        draws = [[loss(batch).double() for batch in (whole, *parts)] for _ in range(_DRAWS)]
    values = torch.tensor(draws, dtype=torch.float64)
    scale = float(values.mean(0).abs().max()) or 1.0
    if not math.isfinite(scale):
        return None
    found: list[float] = []
    for row in weights:
        missed = values[:, 0] - values[:, 1:] @ torch.tensor(row, dtype=torch.float64)
        noise = 4 * float(missed.std()) / math.sqrt(_DRAWS)
        found.append(max(0.0, abs(float(missed.mean())) - noise) / scale)
    return found


@contextmanager
def _differentiable(model: nn.Module) -> Generator[None]:
    """Recurrent layers of cuDNN have no backward pass in evaluation mode; torch's own have one."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    before = torch.backends.cudnn.enabled
    try:
        if recurrent:
            setattr(torch.backends.cudnn, "enabled", False)  # noqa: B010
        yield
    finally:
        setattr(torch.backends.cudnn, "enabled", before)  # noqa: B010
