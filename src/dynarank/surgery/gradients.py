"""The gradients of weights that change form, so that an unfinished accumulation goes on.

They move as a first moment does, see :mod:`dynarank.surgery.moments`: to factors by the vjp of
``join``, exactly; from factors to the least gradient of W that agrees with theirs, which is all
that they say of it. Gradients that a step has used already move too, since they look the same;
``zero_grad`` clears them as it would have cleared the old ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynarank.decompositions import Factors, precise
from dynarank.surgery.edit import Edit
from dynarank.surgery.side import Side

__all__ = ["move_gradients"]


def move_gradients(edit: Edit) -> None:
    """Give the new parameters of an edit the gradients of the old ones, if these have any.

    Gradients that are not finite become NaN: a gradient scaler has to skip its step after as
    before.
    """
    if edit.shards is not None:  # they were moved when the weight was whole
        return
    old, new = edit.site.trained(), edit.trained.values()
    if not edit.old or all(p.grad is None for p in old):
        return
    given = tuple(torch.zeros_like(p) if p.grad is None else _dense(p.grad) for p in old)
    for p, gradient in zip(new, _moved(edit, tuple(map(precise, given))), strict=True):
        if p.requires_grad:
            p.grad = torch.empty_like(p).copy_(gradient)


def _moved(edit: Edit, gradients: Factors) -> Factors:
    new = tuple(map(precise, edit.trained.values()))
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        return tuple(torch.full_like(p, math.nan) for p in new)
    if not any(bool(g.any()) for g in gradients):
        return tuple(map(torch.zeros_like, new))
    spec, change = edit.site.spec, edit.change
    before = Side.of(spec, change.before, {n: precise(p) for n, p in edit.old.items()})
    after = Side.of(spec, change.after, {n: precise(p) for n, p in edit.new.items()})
    return after.pull(before.limited(before.lift(gradients), gradients))


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
