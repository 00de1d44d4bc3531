"""Learning rates of factors: a step of theirs moves the weight as far as a step of its own would.

Legend: U = up (n, r), D = down (r, m), W = U D with singular values s; M the step's direction on W;
eta the learning rate.

A gradient step on both factors moves W by ``-eta (U U' M + M D' D)``. In the singular basis of
balanced factors the (i, j) component of M is thus multiplied by ``eta (s_i + s_j)`` instead of eta.
Dividing each layer's rate by the mean of ``s_i + s_j`` makes its steps as long as full-rank ones.
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
    """Scales the steps of a model's low-rank factors, whatever the optimizer and its schedule.

    ``p <- old + scale (new - old)`` around each step: exactly the step with learning rate
    ``scale lr`` for every optimizer whose step is proportional to it (SGD with momentum, Nesterov
    and weight decay, Adam, AdamW, RMSprop, ...). The optimizer's groups stay as they are.

    Rules, each a factor for both factors of a weight:

    - ``"spectral"``: ``1 / (2 mean(s))``, the mean over the r directions; for SGD.
    - ``"spectron"``: ``1 / (||U||_2 + ||D||_2 + 1)``, a bound of the step's spectral norm.
    - ``"rms"``: as ``"spectral"`` for optimizers whose steps do not depend on the gradient's scale
      (Adam): entries that move by eta each move W's by eta in the mean square.
    - ``"rank-share"``: r / min(n, m), as LORO does with r / d.
    - a float: that factor, for every layer.
    - ``"auto"``: ``"spectral"`` for SGD, 1 for others.

    Only SVD pairs of low-rank weights are scaled: adapters have their alpha, and start from zero.

    Args:
        model: the model.
        optimizer: its optimizer.
        rule: see above.
        layers: which weights, a filter or glob patterns; None: every low-rank one.
        every: steps between two looks at the factors' norms; they are also looked at whenever a
            form has changed. They drift slowly.
        cap: no rate is multiplied by more than this: factors near zero would ask for any.

    Raises:
        ValueError: an unknown rule, one that is not positive and finite, ``every`` below 1, a cap
            that is not positive.

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
        """What each weight's learning rate is multiplied by, by path, as of now."""
        self._refresh()
        return {site.path: scale for site, scale in self._scales}

    def remove(self) -> None:
        """Take the hooks off the optimizer; from then on it steps as it did."""
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
        foreach: Any = torch  # whose foreach operations are not annotated
        foreach._foreach_sub_(news, olds)
        foreach._foreach_mul_(news, scales)
        foreach._foreach_add_(news, olds)
        self._olds = []


def spectral_rate(factors: Factors, rank: int) -> float:
    """``r / (||U||_F^2 + ||D||_F^2)``: for balanced factors ``1 / (2 mean(s))``, without an SVD.

    Args:
        factors: an SVD pair.
        rank: the number of directions, of all groups together.
    """
    return _ratio(rank, sum(_square(f) for f in factors))


def root_mean_square_rate(factors: Factors, groups: int = 1) -> float:
    """``sqrt(n m / (n ||D||_F^2 + m ||U||_F^2))`` for one group; the norms' means over groups.

    Independent entries of size eta in both factors' steps move W's entries by eta / this, in the
    root mean square.

    Args:
        factors: an SVD pair.
        groups: of the weight.
    """
    down, up = factors
    n, m = up.shape[0] // groups, math.prod(down.shape[1:])
    return math.sqrt(_ratio(n * m, (n * _square(down) + m * _square(up)) / groups))


def spectron_rate(factors: Factors, groups: int = 1) -> float:
    """``1 / (||U||_2 + ||D||_2 + 1)``, of the group where it is least.

    Args:
        factors: an SVD pair.
        groups: of the weight.

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
            raise ValueError(f"rule is one of {known} or a factor, got {rule!r}")
        return rules[rule]
    if isinstance(rule, bool) or not (math.isfinite(rule) and rule > 0):
        raise ValueError(f"a factor for the learning rates is positive and finite, got {rule!r}")
    return lambda site: float(rule)


def _groups(site: Site) -> int:
    return site.spec.geometry.groups


def _directions(site: Site) -> int:
    """The rank, of all groups together."""
    return site.factors()[0].shape[0]


def _square(factor: Tensor) -> float:
    return factor.detach().double().square().sum().item()


def _ratio(a: float, b: float) -> float:
    """A / b, without bound where b is zero; 1 where it is not finite, which is not ours to mend."""
    if not math.isfinite(b):
        return 1.0
    return a / b if b > 0 else math.inf
