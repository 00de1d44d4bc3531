"""The named losses for own data: functions ``(output, target) -> scalar`` that check shapes.

torch broadcasts: the mean squared error of outputs ``(N, 1)`` and targets ``(N,)`` would be that of
all N x N pairs. Here such outputs lose their last dimension, and anything else is refused.

Legend: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "Loss", "align", "class_scores", "cross_entropy", "default_loss"]

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function ``(output, target) -> scalar``, a mean over examples."""


def cross_entropy(output: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with logits.

    Args:
        output: ``(N, C)``, ``(N, C, ...)`` as in torch, or ``(N, ..., C)`` as of language models.
        target: classes ``(N)`` or ``(N, ...)``, from 0 to C - 1, -100: ignored; or probabilities of
            the shape of ``output``.
        label_smoothing: the probability that is spread over all classes.

    Raises:
        ValueError: the shapes do not match, or a class is out of range.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3])).exp().round(decimals=4)
        tensor(4.)
    """
    if target.is_floating_point():
        return F.cross_entropy(output, align(output, target)[1], label_smoothing=label_smoothing)
    scores = class_scores(output, target)
    return F.cross_entropy(scores, target.long(), label_smoothing=label_smoothing)


def class_scores(output: Tensor, target: Tensor) -> Tensor:
    """Logits with their classes in dimension 1, as torch has them.

    Raises:
        ValueError: the shapes do not match.
    """
    shape = tuple(target.shape)
    first = output.ndim > 1 and (output.shape[0], *output.shape[2:]) == shape
    last = output.ndim > 2 and tuple(output.shape[:-1]) == shape
    if first and last:
        raise ValueError(
            f"cross-entropy of outputs {tuple(output.shape)} with classes {shape} is ambiguous: "
            "dimension 1 and the last are equally long; flatten them in a loss of your own"
        )
    if not first and not last:
        raise ValueError(
            f"cross-entropy takes logits (N, C) or (N, C, ...) and classes (N) or (N, ...), got "
            f"{tuple(output.shape)} and {shape}"
        )
    return output if first else output.movedim(-1, 1)


def align(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets of the same shape; a last dimension of 1 may be missing in one of them.

    Raises:
        ValueError: the shapes do not match.

    Example:
        >>> [tuple(x.shape) for x in align(torch.ones(3, 1), torch.ones(3))]
        [(3,), (3,)]
    """
    if output.shape == target.shape:
        return output, target.to(output.dtype)
    if output.shape == (*target.shape, 1):
        return output.squeeze(-1), target.to(output.dtype)
    if target.shape == (*output.shape, 1):
        return output, target.squeeze(-1).to(output.dtype)
    raise ValueError(
        f"outputs and targets must have the same shape, got {tuple(output.shape)} and "
        f"{tuple(target.shape)}"
    )


def _aligned(function: Loss, output: Tensor, target: Tensor) -> Tensor:
    return function(*align(output, target))


LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "mse": partial(_aligned, F.mse_loss),
    "l1": partial(_aligned, F.l1_loss),
    "huber": partial(_aligned, F.smooth_l1_loss),
    "bce": partial(_aligned, F.binary_cross_entropy_with_logits),
}
"""The named losses; ``bce`` takes logits."""


def default_loss(target: Tensor) -> str:
    """The loss that suits targets: cross-entropy for classes, mse for real numbers.

    Example:
        >>> default_loss(torch.tensor([0, 1])), default_loss(torch.tensor([0.5]))
        ('cross-entropy', 'mse')
    """
    return "mse" if target.is_floating_point() else "cross-entropy"
