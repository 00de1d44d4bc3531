"""Ranks for a budget: the plan that retains the most energy at a given cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.allocation.knapsack import Option, choose, least_cost
from dynarank.allocation.rules import candidates, spectrum
from dynarank.cost.flops import ModelUse, form_parameters, trace
from dynarank.cost.timing import layer_timer
from dynarank.decompositions import precise
from dynarank.forms import Form, FullRank, LowRank
from dynarank.monitors.calibration import Calibration
from dynarank.surgery.selection import LayerFilter
from dynarank.surgery.sites import Site

__all__ = ["plan_within"]

# A truncation that loses nothing on a few batches is worth a little less than the weight itself:
# where the budget allows both, the weight stays full-rank.
_DOUBT = 1 - 1e-6


def plan_within(
    model: nn.Module,
    sample: Any = None,
    *,
    params: float | int | None = None,
    flops: float | int | None = None,
    seconds: float | None = None,
    calibration: Calibration | None = None,
    multiple_of: int = 8,
    layers: LayerFilter = None,
    decomposition: str = "svd",
    timings: Callable[[str, Form], float] | None = None,
) -> dict[str, Form]:
    """The ranks that keep most within a budget; a weight may stay full-rank.

    ``max sum over weights of the share kept, such that cost(plan) <= budget``, every weight
    counting alike. Greedy on the share gained per cost; the cost is exact (:mod:`dynarank.cost`).
    Apply it with ``apply_plan(model, plan, calibration=calibration)``.

    Args:
        model: any model; it is not changed.
        sample: a batch, as :func:`dynarank.cost.trace` takes it; a budget of parameters needs none.
        params: all parameters of the model: a float in (0, 1] is a share of those with the layers
            at full rank, an int their number.
        flops: those of a training step on ``sample``, likewise.
        seconds: those of the layers in a training step.
        calibration: from :func:`dynarank.calibrate`: the share kept is that of the outputs'
            energy. None, or where it says nothing: of the weight's own.
        multiple_of: ranks are multiples of it; of any size in weights that have fewer directions.
        layers: a filter ``(module, path) -> bool`` or glob patterns; None: every weight that is
            not a table of rows.
        decomposition: the decomposition's name; of one that does not truncate optimally, the share
            kept is measured by splitting the weight at every rank.
        timings: seconds of a training step by path and form; None: measured here, on the model's
            device.

    Raises:
        ValueError: not exactly one budget; a budget below what the least ranks cost (the message
            says what that is); no sample where one is needed.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> plan = plan_within(model, params=0.6)
        >>> [form if isinstance(form, FullRank) else form.rank for form in plan.values()]
        [16, FullRank()]
    """
    sites = candidates(model, layers)
    budget = _budget(model, sites, sample, params, flops, seconds, timings)
    options = {
        site.path: _options(site, budget.cost, calibration, multiple_of, decomposition)
        for site in sites
    }
    least = least_cost(options)
    if least > budget.room:
        raise ValueError(budget.refusal(least))
    return {path: option.what for path, option in choose(options, budget.room).items()}


@dataclass(frozen=True)
class _Budget:
    """What the layers may cost together, beside what lies outside them."""

    name: str
    cost: Callable[[Site, Form], float]
    limit: float
    outside: float
    full: float

    @property
    def room(self) -> float:
        return self.limit - self.outside

    def refusal(self, least: float) -> str:
        whole = self.outside + least
        return (
            f"a budget of {self.limit:g} {self.name} ({self.limit / self.full:.3f} of full-rank) "
            f"is below what the least ranks cost: {whole:g} ({whole / self.full:.3f}); allow that "
            "much, or take in more layers or a smaller multiple_of"
        )


def _budget(
    model: nn.Module,
    sites: Sequence[Site],
    sample: Any,
    params: float | int | None,
    flops: float | int | None,
    seconds: float | None,
    timings: Callable[[str, Form], float] | None,
) -> _Budget:
    given = {"parameters": params, "FLOPs": flops, "seconds": seconds}
    asked = [(name, value) for name, value in given.items() if value is not None]
    if len(asked) != 1:
        raise ValueError(f"give one budget: params, flops or seconds; got {len(asked)} of them")
    ((name, value),) = asked
    if sample is None and (flops is not None or (seconds is not None and timings is None)):
        raise ValueError(f"a budget of {name} needs a sample: a batch of the size it trains on")
    if name == "parameters":
        cost, whole = _parameters, float(sum(p.numel() for p in model.parameters()))
    elif name == "FLOPs":
        use = trace(model, sample)
        cost, whole = _flops(use), float(use.flops({}).training)
    else:
        cost = _seconds(model, sample, timings)
        whole = sum(cost(site, _form(site)) for site in sites)
    outside = whole - sum(cost(site, _form(site)) for site in sites)
    full = outside + sum(cost(site, FullRank()) for site in sites)
    return _Budget(name, cost, _limit(name, value, full), outside, full)


def _limit(name: str, value: float | int, full: float) -> float:
    """The budget itself: a float is a share of full rank's, except seconds."""
    if isinstance(value, bool) or not value > 0:
        raise ValueError(f"a budget is positive, got {value!r} {name}")
    if name == "seconds" or isinstance(value, int):
        return value
    if value > 1:
        raise ValueError(
            f"a float budget of {name} is a share of full rank's, in (0, 1], got {value!r}; give "
            "an int for a number"
        )
    return value * full


def _parameters(site: Site, form: Form) -> float:
    return form_parameters(site.spec, form)[1]


def _flops(use: ModelUse) -> Callable[[Site, Form], float]:
    return lambda site, form: use.layers[site.path].flops(form).training


def _seconds(
    model: nn.Module, sample: Any, timings: Callable[[str, Form], float] | None
) -> Callable[[Site, Form], float]:
    if timings is None:
        first = next(model.parameters())
        last = any(
            p.ndim == 4
            and p.is_contiguous(memory_format=torch.channels_last)
            and not p.is_contiguous()
            for p in model.parameters()
        )
        timings = layer_timer(trace(model, sample), first.device, channels_last=last)
    return lambda site, form: timings(site.path, form)


def _options(
    site: Site,
    cost: Callable[[Site, Form], float],
    calibration: Calibration | None,
    multiple_of: int,
    decomposition: str,
) -> list[Option[Form]]:
    """The full weight, and every rank that is cheaper."""
    full = Option[Form](FullRank(), cost(site, FullRank()), 1.0)
    limit = site.spec.decomposition(LowRank(1, decomposition)).limit(site.shape)
    step = multiple_of if limit >= multiple_of else 1
    forms = [LowRank(rank, decomposition) for rank in range(step, limit + 1, step)]
    costs = {form: cost(site, form) for form in forms}
    cheaper = [form for form in forms if costs[form] < full.cost]
    if not cheaper:
        return [full]
    kept = _kept(site, cheaper, calibration)
    pairs = zip(cheaper, kept, strict=True)
    return [full, *(Option[Form](form, costs[form], k * _DOUBT) for form, k in pairs)]


def _kept(site: Site, forms: Sequence[LowRank], calibration: Calibration | None) -> list[float]:
    """The share that each form keeps of the outputs' energy, or of the weight's."""
    if not site.spec.decomposition(forms[0]).truncates_optimally:
        weight = precise(site.effective())
        return [_kept_by_split(site, weight, form) for form in forms]
    energies = spectrum(site, calibration).square().sum(0)
    total = energies.sum().item()
    shares = (energies.cumsum(0) / total).tolist() if total > 0 else [1.0] * len(energies)
    return [shares[form.resolved_rank - 1] for form in forms]


def _kept_by_split(site: Site, weight: Tensor, form: LowRank) -> float:
    d = site.spec.decomposition(form)
    rest = weight - d.join(d.split(weight, form.resolved_rank))
    total = weight.square().sum().item()
    return 1 - rest.square().sum().item() / total if total > 0 else 1.0


def _form(site: Site) -> Form:
    assert site.form is not None
    return site.form
