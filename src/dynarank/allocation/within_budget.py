"""Ranks within a budget: the plan that retains the most energy at a given cost."""

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

# A truncation that loses nothing on a few batches counts slightly less than the weight itself, so
# that the weight stays full-rank if the budget allows both.
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
    """Choose the ranks that keep the most energy within a budget; weights may stay full-rank.

    Maximizes the sum over weights of the share of energy kept, such that ``cost(plan) <= budget``.
    Greedy on the share gained per cost; the cost is exact (:mod:`dynarank.cost`). Apply the result
    with ``apply_plan(model, plan, calibration=calibration)``.

    Args:
        model: any model; it is not changed.
        sample: a batch: a tensor, a tuple or list of positional arguments of the forward pass, or a
            dict of keyword arguments. Not needed for a budget of parameters.
        params: a budget for all parameters of the model: a share of the full-rank number (float in
            (0, 1]) or a number (int).
        flops: a budget for the FLOPs of a training step on ``sample``: a share of the full-rank
            number (float in (0, 1]) or a number (int).
        seconds: a budget for the time of these layers in a training step.
        calibration: statistics from :func:`dynarank.calibrate`: the share kept is that of the
            energy of the outputs. For weights without statistics, or all of them with None, it is
            that of the weight's own energy.
        multiple_of: ranks are multiples of this number, except in weights with fewer directions.
        layers: a filter ``(module, path) -> bool`` or glob patterns; None: every weight except
            embeddings, output layers and small ones.
        decomposition: the decomposition's name; if it does not truncate optimally, the share kept
            is measured by splitting the weight at every rank.
        timings: a function from path and form to seconds per training step; None: measured now, on
            the model's device.

    Raises:
        ValueError: not exactly one budget; a budget below the cost of the smallest ranks, which the
            message gives; no sample where one is needed.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> plan = plan_within(model, params=0.6)
        >>> {path: form.rank for path, form in plan.items()}
        {'0': 16}
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
    """The budget of the layers, and the fixed cost of everything else."""

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
            f"is below the cost of the smallest ranks, {whole:g} ({whole / self.full:.3f}); allow "
            "that much, or include more layers or lower multiple_of"
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
        raise ValueError(f"a budget of {name} needs a sample, a batch of the usual training size")
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
    """The budget as a number: a float is a share of the full-rank cost, except for seconds."""
    if isinstance(value, bool) or not value > 0:
        raise ValueError(f"a budget is positive, got {value!r} {name}")
    if name == "seconds" or isinstance(value, int):
        return value
    if value > 1:
        raise ValueError(
            f"a float budget of {name} is a share of the full-rank {name}, in (0, 1], got "
            f"{value!r}; pass an int for an absolute number"
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
    """The options of a weight: full rank, and every rank that is cheaper."""
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
    """The share of the outputs' energy, or of the weight's, that each form keeps."""
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
