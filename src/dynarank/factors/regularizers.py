"""Penalties on factors, as gradients added before the optimizer's step.

Legend: ``W`` (n, m) a matricized weight, D = down (r, m), U = up (n, r), W = U D; F a factor as a
tall matrix (..., m, r): U itself, or D'. c the coefficient, I an identity.

Each penalty is a function that computes the gradients of factors in closed form, tested against
automatic differentiation, and a class that adds them to the gradients of a model's factors, also
after changes of form.

Non-finite entries of a penalty's gradient are not added, and a parameter without a gradient gets
none: a penalty never makes a finite gradient non-finite and never hides a non-finite one. The
gradients are computed in fp32 or wider. They pass through the optimizer like any gradient: with
AdamW this is not decoupled decay, and the optimizer's own weight decay is applied in addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynarank.decompositions import Decomposition, Factors
from dynarank.factors.live_sites import LiveSites
from dynarank.forms import Adapted, FullRank
from dynarank.surgery.own_references import innermost
from dynarank.surgery.selection import LayerFilter
from dynarank.surgery.sites import Site

__all__ = [
    "SRIP",
    "FrobeniusDecay",
    "Regularizer",
    "SoftOrthogonality",
    "orthogonality_gradient",
    "srip_gradient",
    "tall_matrices",
]


def frobenius_gradients(decomposition: Decomposition, factors: Factors) -> Factors:
    """The gradients of ``1/2 ||join(factors)||_F^2``: ``pull(factors, join(factors))``.

    For an SVD pair ``(U'U) D`` and ``U (D D')``: 2 r^2 (m + n) multiplications, W never formed.
    """
    if not decomposition.is_pair:
        return decomposition.pull(factors, decomposition.join(factors))
    down, up = (f.flatten(1).unflatten(0, (decomposition.groups, -1)) for f in factors)
    pulled = (up.mT @ up) @ down, up @ (down @ down.mT)
    return tuple(g.reshape(f.shape) for g, f in zip(pulled, factors, strict=True))


def orthogonality_gradient(tall: Tensor) -> Tensor:
    """The gradient ``4 F (F'F - I)`` of ``||F'F - I||_F^2``; F (..., m, r)."""
    return 4 * tall @ _excess(tall)


def srip_gradient(tall: Tensor, iterations: int = 10) -> Tensor:
    """The gradient ``2 sign(mu) F v v'`` of ``||F'F - I||_2``; F (..., m, r).

    (mu, v) is the eigenpair of ``F'F - I`` with the largest ``|mu|``.
    """
    excess = _excess(tall)  # (..., r, r)
    generator = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # as the generator
    start = torch.randn(tall.shape[-1], 1, generator=generator, **options)
    vector = start.to(tall).expand(*tall.shape[:-2], -1, -1)
    tiny = torch.finfo(tall.dtype).tiny
    for _ in range(iterations):
        vector = excess @ vector
        vector = vector / vector.norm(dim=-2, keepdim=True).clamp(min=tiny)
    value = vector.mT @ excess @ vector  # (..., 1, 1)
    return 2 * value.sign() * (tall @ vector) @ vector.mT


def tall_matrices(decomposition: Decomposition, factors: Factors) -> tuple[Tensor, Tensor]:
    """The first factor, transposed to (groups, m, r), and the last (groups, n, r), as matrices."""
    ends, groups = (factors[0], factors[-1]), decomposition.groups
    first, last = (f.flatten(1).unflatten(0, (groups, -1)) for f in ends)
    return first.mT, last


def through_norms(rule: Callable[[Tensor], Tensor], tall: Tensor) -> Tensor:
    """The gradient in F if ``rule`` gives that in F with normalized columns; 0 where F is 0."""
    norms = tall.norm(dim=-2, keepdim=True)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    unit = tall * inverse
    gradient = rule(unit)
    return (gradient - unit * (unit * gradient).sum(-2, keepdim=True)) * inverse


def _excess(tall: Tensor) -> Tensor:
    gram = tall.mT @ tall
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


class Regularizer:
    """The base class of penalties; call ``add_gradients`` between backward and optimizer step.

    Args:
        model: the model; its current factors are looked up at each call.
        coefficient: the coefficient c >= 0, finite.
        layers: which weights, a filter or glob patterns; None: every supported weight.

    Raises:
        ValueError: the coefficient is negative or not finite; ``layers`` matches nothing.
    """

    def __init__(self, model: nn.Module, coefficient: float, layers: LayerFilter = None) -> None:
        if isinstance(coefficient, bool) or not (math.isfinite(coefficient) and coefficient >= 0):
            raise ValueError(f"coefficient must be finite and >= 0, got {coefficient!r}")
        self.coefficient = float(coefficient)
        self._sites = LiveSites(model, layers)

    def gradients(self, site: Site) -> list[tuple[Tensor, Tensor]]:
        """The penalized parameters of a weight, each with dR/dp without the coefficient.

        The gradients are computed in fp32 or wider.
        """
        raise NotImplementedError

    @torch.no_grad()
    def add_gradients(self, scale: Tensor | float = 1.0) -> None:
        """Add the gradients, ``p.grad += c scale dR/dp``, for trainable parameters with a gradient.

        Args:
            scale: the loss scale, if the gradients are still multiplied by it.
        """
        for site in self._sites() if self.coefficient else []:
            for p, gradient in self.gradients(site):
                if p.requires_grad and p.grad is not None:
                    added = torch.nan_to_num(gradient * self.coefficient * scale, 0.0, 0.0, 0.0)
                    p.grad.add_(added.to(p.grad.dtype))

    def register(self, optimizer: Optimizer) -> RemovableHandle:
        """Register a hook that adds the gradients at the start of each ``optimizer.step()``.

        This is the right place with a ``GradScaler``: the gradients are unscaled by then, and if a
        fused optimizer unscales them itself, the penalty is scaled too. Of an optimizer that wraps
        others, it is the first of those that take the steps.

        Returns:
            A handle that removes the hook.

        Raises:
            ValueError: (at a step) the step has a closure, which recomputes the gradients.
        """
        return innermost(optimizer)[0].register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        values = [*args[1:], *args[:1], *kwargs.values()]
        if any(callable(a) and not isinstance(a, Optimizer) for a in values):
            raise ValueError(
                "optimizer.step(closure) computes the gradients after the penalty was added; "
                "call add_gradients() at the end of the closure instead of register()"
            )
        scale = getattr(optimizer, "grad_scale", None)
        self.add_gradients(1.0 if scale is None else scale)


class FrobeniusDecay(Regularizer):
    """Frobenius decay of the effective weight in any form, ``R = 1/2 ||W||_F^2``.

    For full-rank weights this is plain weight decay. For low-rank weights it decays the product,
    through r x r Gram matrices; decaying the factors instead would penalize the nuclear norm. For
    adapted weights the effective weight ``base + scale U D`` is penalized too, so that a change of
    form does not change the objective; ``adapted="adapter"`` penalizes ``scale U D`` only, which
    pulls W to the base.

    Args:
        model: the model; its current factors are looked up at each call.
        coefficient: the coefficient c >= 0, finite.
        layers: which weights, a filter or glob patterns; None: every supported weight.
        adapted: the penalized part of an adapted weight, ``"weight"`` or ``"adapter"``.

    Example:
        >>> model = dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = FrobeniusDecay(model, 1e-4).register(optimizer)

    Reference:
        Khodak, Tenenholtz, Mackey and Fusi, "Initialization and Regularization of Factorized
        Neural Layers", arXiv 2105.01029, 2021.
    """

    def __init__(
        self,
        model: nn.Module,
        coefficient: float,
        layers: LayerFilter = None,
        *,
        adapted: Literal["weight", "adapter"] = "weight",
    ) -> None:
        if adapted not in ("weight", "adapter"):
            raise ValueError(f'adapted is "weight" or "adapter", got {adapted!r}')
        super().__init__(model, coefficient, layers)
        self._adapted = adapted

    def gradients(self, site: Site) -> list[tuple[Tensor, Tensor]]:
        """The gradient W, or ``pull(factors, W)`` times the adapter's scale."""
        form = site.form
        if form is None or isinstance(form, FullRank):
            return [(p, _wide(p)) for p in site.parameters().values()]
        factors, wide = site.factors(), tuple(_wide(f) for f in site.factors())
        decomposition = site.spec.decomposition(form)
        pulled = frobenius_gradients(decomposition, wide)
        if isinstance(form, Adapted):
            pulled = tuple(g * form.scale**2 for g in pulled)
            if self._adapted == "weight":
                base = site.spec.to_canonical(_wide(site.spec.base(form, site.parameters())))
                extra = decomposition.pull(wide, base * form.scale)
                pulled = tuple(g + e for g, e in zip(pulled, extra, strict=True))
        return list(zip(factors, pulled, strict=True))


class SoftOrthogonality(Regularizer):
    """Soft orthogonality of the first and last factor, the sum of their ``R = ||F'F - I||_F^2``.

    Pulls the rows of ``down`` and the columns of ``up`` to orthonormal ones, in each group
    separately. As defined this fixes the scale as well: every singular value of a factor, and so of
    the product, is pulled to 1 (balanced factors have sqrt(s)). ``normalized=True`` applies the
    penalty to the columns of F divided by their norms: only the angles count, and the scale is left
    to the loss. Full-rank weights and the inner factors of longer chains are not penalized.

    Args:
        model: the model; its current factors are looked up at each call.
        coefficient: the coefficient c >= 0, finite.
        layers: which weights, a filter or glob patterns; None: every supported weight.
        normalized: whether to normalize the columns first.

    Reference:
        Bansal, Chen and Wang, "Can We Gain More from Orthogonality Regularizations in Training Deep
        CNNs?", arXiv 1810.09102, 2018.
    """

    def __init__(
        self,
        model: nn.Module,
        coefficient: float,
        layers: LayerFilter = None,
        *,
        normalized: bool = False,
    ) -> None:
        super().__init__(model, coefficient, layers)
        self._normalized = normalized

    def gradient(self, tall: Tensor) -> Tensor:
        """The gradient dR/dF for one matrix (groups, m, r)."""
        return orthogonality_gradient(tall)

    def gradients(self, site: Site) -> list[tuple[Tensor, Tensor]]:
        """The gradients of the first and the last factor."""
        if site.form is None or isinstance(site.form, FullRank):
            return []
        if site.sharding is not None:
            raise ValueError(
                f"layer {site.path!r} is sharded by fully_shard, and {type(self).__name__} needs "
                "whole factors at each step: use FrobeniusDecay, or leave the layer out (layers=)"
            )
        rule = partial(through_norms, self.gradient) if self._normalized else self.gradient
        return _end_gradients(site.spec.decomposition(site.form), site.factors(), rule)


class SRIP(SoftOrthogonality):
    """Spectral restricted isometry of the first and last factor, ``R = ||F'F - I||_2``.

    Like :class:`SoftOrthogonality`, but only the eigenvalue of largest magnitude is penalized. It
    is computed by power iteration from a fixed vector, so a step depends only on the factors.

    Args:
        model: the model; its current factors are looked up at each call.
        coefficient: the coefficient c >= 0, finite.
        layers: which weights, a filter or glob patterns; None: every supported weight.
        normalized: whether to normalize the columns first.
        iterations: the number of power iterations; 2 in the paper.

    Reference:
        Bansal, Chen and Wang, arXiv 1810.09102, 2018, eq. 7 to 9.
    """

    def __init__(
        self,
        model: nn.Module,
        coefficient: float,
        layers: LayerFilter = None,
        *,
        normalized: bool = False,
        iterations: int = 10,
    ) -> None:
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        super().__init__(model, coefficient, layers, normalized=normalized)
        self._iterations = iterations

    def gradient(self, tall: Tensor) -> Tensor:
        """The gradient ``2 sign(mu) F v v'`` for one matrix (groups, m, r)."""
        return srip_gradient(tall, self._iterations)


def _end_gradients(
    decomposition: Decomposition, factors: Factors, rule: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    first, last = tall_matrices(decomposition, tuple(_wide(f) for f in factors))
    gradients = rule(first).mT, rule(last)
    ends = factors[0], factors[-1]
    return [(f, g.reshape(f.shape)) for f, g in zip(ends, gradients, strict=True)]


def _wide(tensor: Tensor) -> Tensor:
    """The tensor, detached, in fp32 or wider."""
    small = tensor.dtype in (torch.float16, torch.bfloat16)
    return cast(Parameter, tensor).detach().to(torch.float32 if small else tensor.dtype)
