"""A budget for a model's layers: what each form of a layer costs, and how much there is to spend.

Costs are exact (:mod:`dynarank.cost`), but for seconds, which are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import torch
from torch import nn

from dynarank.cost.budget import below_least
from dynarank.cost.flops import ModelUse, form_parameters, trace
from dynarank.cost.timing import layer_timer
from dynarank.forms import Form, FullRank, Plan
from dynarank.surgery.selection import find_sites
from dynarank.surgery.sites import Site, survey

__all__ = ["Budget", "BudgetArguments", "find_budget"]

_UNITS = {"params": "parameters", "flops": "FLOPs", "bytes": "bytes", "seconds": "seconds"}


@dataclass(frozen=True)
class BudgetArguments:
    """The budget that a user gives to :func:`dynarank.plan_within`."""

    amounts: Mapping[str, float | int | None]
    of: Literal["model", "layers"]
    sample: Any = None
    timings: Callable[[str, Form], float] | None = None
    use: ModelUse | None = None

    def one(self) -> tuple[str, float | int]:
        """The kind of the only budget and its amount.

        Raises:
            ValueError: there is not exactly one, or it needs a sample.
        """
        given = [(kind, amount) for kind, amount in self.amounts.items() if amount is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one budget: {', '.join(self.amounts)}; got {len(given)} of them"
            )
        if self.of not in ("model", "layers"):
            raise ValueError(f'a budget is of the "model" or of its "layers", got {self.of!r}')
        ((kind, amount),) = given
        known = self.sample is not None or self.use is not None
        if not known and (kind == "flops" or (kind == "seconds" and self.timings is None)):
            raise ValueError(
                f"a budget of {_UNITS[kind]} needs a sample, a batch of the usual training size"
            )
        return kind, amount


@dataclass(frozen=True)
class Budget:
    """What the chosen layers may cost together, and what everything else costs.

    Args:
        asked: the amount as it was given, a share (float) or a number (int).
        of: ``"model"`` or ``"layers"``.
        unit: what is counted.
        cost: of a weight in a form.
        limit: of all that the budget is of.
        outside: the cost of what it is of, besides the chosen layers.
        full: the cost of what it is of, every layer full-rank.
    """

    asked: float | int
    of: str
    unit: str
    cost: Callable[[Site, Form], float]
    limit: float
    outside: float
    full: float

    @property
    def room(self) -> float:
        """What the chosen layers may cost."""
        return self.limit - self.outside

    def refusal(self, least: float) -> str:
        """Why the smallest ranks, which cost ``least``, are too much."""
        whole = self.outside + least
        if self.unit == "seconds":
            return (
                f"a budget of {self.limit!r} seconds is below the time of the smallest ranks, "
                f"{_rounded_up(whole)}; allow that much, or include more layers or lower "
                "multiple_of"
            )
        told = below_least(self.asked, self.unit, self.of, self.full, self.outside, least)
        return f"{told} or lower multiple_of"


def _rounded_up(seconds: float) -> float:
    """Seconds to four digits, not less."""
    scale = 10.0 ** (3 - math.floor(math.log10(seconds)))
    return math.nextafter(math.ceil(seconds * scale) / scale, math.inf)


def find_budget(
    model: nn.Module, chosen: Sequence[Site], request: BudgetArguments, planned: Plan
) -> Budget:
    """The budget of the chosen layers, others having the forms that are planned for them.

    Args:
        model: the model.
        chosen: the layers whose ranks are chosen.
        request: what is asked for.
        planned: the forms that other layers will have; those not named keep theirs.
    """
    kind, amount = request.one()
    sites = [site for site in survey(model) if site.form is not None]
    cost, fixed = _cost(model, sites, kind, request)
    full = sum(cost(site, FullRank()) for site in chosen)
    outside = 0.0
    if request.of == "model" and kind != "seconds":
        paths = {site.path for site in chosen}
        forms = {
            site.path: planned[path] for path, site in find_sites(model, sites, planned).items()
        }
        others = [site for site in sites if site.path not in paths]
        outside = fixed + sum(cost(site, forms.get(site.path, form_of(site))) for site in others)
        full += fixed + sum(cost(site, FullRank()) for site in others)
    return Budget(amount, request.of, _UNITS[kind], cost, _limit(kind, amount, full), outside, full)


def form_of(site: Site) -> Form:
    """The form of a weight that can change form."""
    assert site.form is not None
    return site.form


def _cost(
    model: nn.Module, sites: Sequence[Site], kind: str, request: BudgetArguments
) -> tuple[Callable[[Site, Form], float], float]:
    """The cost of each weight in a form, and that of everything else."""
    if kind == "seconds":
        return _seconds(model, request), 0.0
    if kind == "flops":
        use = _known(sites, request.use) or trace(model, request.sample)
        return lambda site, form: use.layers[site.path].flops(form).training, use.rest.training
    cost = _parameters if kind == "params" else _bytes
    sizes = (p.numel() * (1 if kind == "params" else p.element_size()) for p in model.parameters())
    return cost, sum(sizes) - sum(cost(site, form_of(site)) for site in sites)


def _known(sites: Sequence[Site], use: ModelUse | None) -> ModelUse | None:
    """The trace, if there is one, which must be of this model."""
    for site in sites:
        if use is not None and site.path not in use.layers:
            raise ValueError(f"the trace has no layer {site.path!r}; trace this model")
    return use


def _parameters(site: Site, form: Form) -> int:
    return form_parameters(site.spec, form)[1]


def _bytes(site: Site, form: Form) -> int:
    """As they will be stored: the base in the old base's dtype, factors in the old factors'."""
    old = [p.element_size() for p in site.parameters().values()]
    factors, whole = form_parameters(site.spec, form)
    if isinstance(form, FullRank):
        return whole * old[0]
    return factors * old[-1] + (whole - factors) * old[0]


def _limit(kind: str, value: float | int, full: float) -> float:
    """The budget as a number: a float is a share of the full-rank cost, except for seconds."""
    unit = _UNITS[kind]
    if isinstance(value, bool) or not value > 0:
        raise ValueError(f"a budget is positive, got {value!r} {unit}")
    if kind == "seconds" or isinstance(value, SupportsIndex):
        return float(value)
    if value > 1:
        raise ValueError(
            f"a float budget of {unit} is a share of the full-rank {unit}, in (0, 1], got "
            f"{value!r}; pass an int for an absolute number"
        )
    return value * full


def _seconds(model: nn.Module, request: BudgetArguments) -> Callable[[Site, Form], float]:
    timings = request.timings
    if timings is None:
        first = next(model.parameters())
        last = any(
            p.ndim == 4
            and p.is_contiguous(memory_format=torch.channels_last)
            and not p.is_contiguous()
            for p in model.parameters()
        )
        use = request.use or trace(model, request.sample)
        timings = layer_timer(use, first.device, channels_last=last)
    return lambda site, form: timings(site.path, form)
