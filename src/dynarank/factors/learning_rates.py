"""A learning rate of their own for low-rank factors, whatever the form has been and will be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.factors.live_sites import LiveSites
from dynarank.forms import LowRank
from dynarank.surgery.own_references import innermost
from dynarank.surgery.selection import LayerFilter

__all__ = ["FactorLearningRates"]


class FactorLearningRates:
    """Multiplies the learning rate of low-rank factors, for any optimizer and LR schedule.

    ``p <- old + c (new - old)`` around each step, for the factors of weights that are low-rank at
    the time. This is exactly a step with learning rate ``c lr`` for all optimizers whose step is
    proportional to it (SGD with momentum, Nesterov and weight decay, Adam, AdamW, RMSprop, ...).
    The optimizer's groups are not changed, so a full-rank phase and the LR schedule keep their own
    rate. Adapters are not scaled: they have their alpha.

    No c is right for every network: tune it with the rate, see ``docs/methods/factors.md``.

    Args:
        model: the model.
        optimizer: its optimizer.
        multiplier: c > 0, finite.
        layers: which weights, a filter or glob patterns; None: every low-rank weight.

    Raises:
        ValueError: a multiplier that is not positive and finite; ``layers`` matches nothing.

    Example:
        >>> model = dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rates = FactorLearningRates(model, optimizer, 2.0)
        >>> rates.paths()
        ['0']
        >>> rates.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        multiplier: float,
        *,
        layers: LayerFilter = None,
    ) -> None:
        if isinstance(multiplier, bool) or not (math.isfinite(multiplier) and multiplier > 0):
            raise ValueError(f"multiplier must be positive and finite, got {multiplier!r}")
        self.multiplier = float(multiplier)
        self._sites = LiveSites(model, layers)
        self._news: list[Tensor] = []
        self._olds: list[Tensor] = []
        self._handles = [
            handle
            for one in innermost(optimizer)
            for handle in (
                one.register_step_pre_hook(self._before),
                one.register_step_post_hook(self._after),
            )
        ]

    def paths(self) -> list[str]:
        """The paths of the weights whose factors are scaled now."""
        return [site.path for site in self._sites() if isinstance(site.form, LowRank)]

    def remove(self) -> None:
        """Remove the hooks from the optimizer, so that it steps as before."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        low_rank = [site for site in self._sites() if isinstance(site.form, LowRank)]
        factors = {id(p): p for site in low_rank for p in site.factors() if p.requires_grad}
        self._news = [p for key, p in factors.items() if key in held]
        self._olds = [p.detach().clone() for p in self._news]

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._news:
            foreach: Any = torch  # its foreach operations are not annotated
            foreach._foreach_sub_(self._news, self._olds)
            foreach._foreach_mul_(self._news, self.multiplier)
            foreach._foreach_add_(self._news, self._olds)
        self._news, self._olds = [], []
