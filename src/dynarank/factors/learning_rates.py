"""Learning rates for factors, so that the weight moves as far as in a full-rank step.

Legend: U = up (n, r), D = down (r, m), W = U D with singular values s; M the step's direction on W;
eta the learning rate.

A gradient step on both factors moves W by ``-eta (U U' M + M D' D)``. In the singular basis of
balanced factors the (i, j) component of M is thus multiplied by ``eta (s_i + s_j)`` instead of eta.
Dividing each layer's rate by the mean of ``s_i + s_j`` makes its steps as large as full-rank ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from dynarank.decompositions import Factors
from dynarank.factors.live_sites import LiveSites
from dynarank.forms import LowRank
from dynarank.surgery.selection import LayerFilter
from dynarank.surgery.sites import Site

__all__ = [
    "FactorLearningRates",
    "FactorRule",
    "root_mean_square_rate",
    "spectral_rate",
    "spectron_rate",
]

FactorRule: TypeAlias = Literal["auto", "spectral", "spectron", "rms", "rank-share"]


class FactorLearningRates:
    """Scales the optimizer steps of a model's low-rank factors, for any optimizer and LR schedule.

    ``p <- old + scale (new - old)`` around each step. This is exactly a step with learning rate
    ``scale lr`` for all optimizers whose step is proportional to it (SGD with momentum, Nesterov
    and weight decay, Adam, AdamW, RMSprop, ...). The optimizer's groups are not changed.

    Each rule gives a multiplier of the learning rate for both factors of a weight:

    - ``"spectral"``: ``1 / (2 mean(s))``, the mean over the r directions; for SGD.
    - ``"spectron"``: ``1 / (||U||_2 + ||D||_2 + 1)``, which bounds the spectral norm of the step.
    - ``"rms"``: like ``"spectral"``, for optimizers whose steps do not depend on the gradient's
      scale (Adam): if all entries of the factors move by eta, the entries of W move by eta in the
      root mean square.
    - ``"rank-share"``: r / min(n, m), as LORO does with r / d.
    - a float: this multiplier for every layer.
    - ``"auto"``: ``"spectral"`` for SGD, 1 for others.

    Only SVD pairs of low-rank weights are scaled: adapters have their alpha, and start from zero.

    Args:
        model: the model.
        optimizer: its optimizer.
        rule: the name of a rule above, or a multiplier.
        layers: which weights, a filter or glob patterns; None: every low-rank weight.
        every: the number of steps between updates of the multipliers from the factors' norms, which
            drift slowly. They are also updated after every change of form.
        cap: the largest multiplier; near-zero factors would otherwise get arbitrarily large ones.

    Raises:
        ValueError: an unknown rule, a multiplier that is not positive and finite, ``every`` below
            1, a cap that is not positive.

    Example:
        >>> model = dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rates = FactorLearningRates(model, optimizer)
        >>> list(rates.scales())
        ['0']
        >>> rates.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rule: FactorRule | float = "auto",
        *,
        layers: LayerFilter = None,
        every: int = 10,
        cap: float = 10.0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is a number of steps >= 1, got {every}")
        if not cap > 0:
            raise ValueError(f"cap is positive, got {cap!r}")
        self._rule = _rule(rule, optimizer)
        self._every, self._cap = every, cap
        self._sites = LiveSites(model, layers)
        self._seen: list[Site] = []
        self._scales: list[tuple[Site, float]] = []
        self._age = 0
        self._olds: list[tuple[Tensor, Tensor, float]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),  # pyright: ignore
            optimizer.register_step_post_hook(self._after),  # pyright: ignore
        ]

    def scales(self) -> dict[str, float]:
        """The current multiplier of each weight's learning rate, by path."""
        self._refresh()
        return {site.path: scale for site, scale in self._scales}

    def remove(self) -> None:
        """Remove the hooks from the optimizer, so that it steps as before."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _refresh(self) -> None:
        sites = self._sites()
        self._scales = [
            (s, min(self._rule(s), self._cap))
            for s in sites
            if isinstance(s.form, LowRank) and s.spec.decomposition(s.form).is_pair
        ]
        self._seen, self._age = sites, 0

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._seen is not self._sites() or self._age >= self._every:
            self._refresh()
        self._age += 1
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._olds = [
            (p, p.detach().clone(), scale)
            for site, scale in self._scales
            for p in site.factors()
            if scale != 1 and p.grad is not None and id(p) in held
        ]

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._olds:
            return
        news, olds, scales = (list(part) for part in zip(*self._olds, strict=True))
        foreach: Any = torch  # its foreach operations are not annotated
        foreach._foreach_sub_(news, olds)
        foreach._foreach_mul_(news, scales)
        foreach._foreach_add_(news, olds)
        self._olds = []


def spectral_rate(factors: Factors, rank: int) -> float:
    """The multiplier ``r / (||U||_F^2 + ||D||_F^2)``, which is ``1 / (2 mean(s))`` if balanced.

    Args:
        factors: an SVD pair.
        rank: r, the number of directions of all groups together.
    """
    return _ratio(rank, sum(_square(f) for f in factors))


def root_mean_square_rate(factors: Factors, groups: int = 1) -> float:
    """The multiplier ``sqrt(n m / (n ||D||_F^2 + m ||U||_F^2))``, with norms averaged over groups.

    If both factors move by independent entries of size eta, the entries of W move by eta divided by
    this multiplier, in the root mean square.

    Args:
        factors: an SVD pair.
        groups: the number of groups of the weight.
    """
    down, up = factors
    n, m = up.shape[0] // groups, math.prod(down.shape[1:])
    return math.sqrt(_ratio(n * m, (n * _square(down) + m * _square(up)) / groups))


def spectron_rate(factors: Factors, groups: int = 1) -> float:
    """The multiplier ``1 / (||U||_2 + ||D||_2 + 1)``, the smallest one over the groups.

    Args:
        factors: an SVD pair.
        groups: the number of groups of the weight.

    Reference:
        Spectron, arXiv 2602.12429, 2026.
    """
    down, up = (f.detach().flatten(1).unflatten(0, (groups, -1)).double() for f in factors)
    norms = torch.linalg.matrix_norm(down, 2) + torch.linalg.matrix_norm(up, 2)
    return 1 / (norms.max().item() + 1)


def _rule(rule: FactorRule | float, optimizer: Optimizer) -> Callable[[Site], float]:
    rules: dict[str, Callable[[Site], float]] = {
        "spectral": lambda s: spectral_rate(s.factors(), _directions(s)),
        "spectron": lambda s: spectron_rate(s.factors(), _groups(s)),
        "rms": lambda s: root_mean_square_rate(s.factors(), _groups(s)),
        "rank-share": lambda s: (
            _directions(s) / _groups(s) / min(s.spec.unit_shape[0], math.prod(s.shape[1:]))
        ),
    }
    if rule == "auto":
        rule = "spectral" if isinstance(optimizer, SGD) else 1.0
    if isinstance(rule, str):
        if rule not in rules:
            known = ", ".join(map(repr, ("auto", *rules)))
            raise ValueError(f"rule is one of {known} or a number, got {rule!r}")
        return rules[rule]
    if isinstance(rule, bool) or not (math.isfinite(rule) and rule > 0):
        raise ValueError(f"a learning-rate multiplier is positive and finite, got {rule!r}")
    return lambda site: float(rule)


def _groups(site: Site) -> int:
    return site.spec.geometry.groups


def _directions(site: Site) -> int:
    """The number of directions of all groups together."""
    return site.factors()[0].shape[0]


def _square(factor: Tensor) -> float:
    return factor.detach().double().square().sum().item()


def _ratio(a: float, b: float) -> float:
    """A / b, infinite if b is zero; 1 if not finite, for weights that have diverged."""
    if not math.isfinite(b):
        return 1.0
    return a / b if b > 0 else math.inf
