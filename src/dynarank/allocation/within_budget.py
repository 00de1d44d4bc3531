"""Ranks within a budget: the plan that retains the most energy at a given cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from dynarank.allocation.budget import BudgetArguments, find_budget
from dynarank.allocation.knapsack import Option, choose, choose_evenly
from dynarank.allocation.rules import candidates, spectrum
from dynarank.cost.budget import rank_step
from dynarank.cost.flops import ModelUse
from dynarank.decompositions import precise
from dynarank.forms import Form, FullRank, LowRank, Plan
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
    bytes: float | int | None = None,
    seconds: float | None = None,
    of: Literal["model", "layers"] = "model",
    ranks: Literal["energy", "uniform"] = "energy",
    calibration: Calibration | None = None,
    multiple_of: int | None = 8,
    layers: LayerFilter = None,
    decomposition: str = "svd",
    timings: Callable[[str, Form], float] | None = None,
    planned: Plan = MappingProxyType({}),
    use: ModelUse | None = None,
) -> dict[str, Form]:
    """Choose the ranks that keep the most energy within a budget; weights may stay full-rank.

    Maximizes the sum over weights of the share of energy kept, such that ``cost(plan) <= budget``.
    Greedy on the share gained per cost; the cost is exact (:mod:`dynarank.cost`). Apply the result
    with ``apply_plan(model, plan, calibration=calibration)``.

    Args:
        model: any model; it is not changed.
        sample: a batch: a tensor, a tuple or list of positional arguments of the forward pass, or a
            dict of keyword arguments. Only needed for a budget of FLOPs or seconds.
        params: a budget for parameters: a share of the full-rank number (float in (0, 1]) or a
            number (int).
        flops: a budget for the FLOPs of a training step on ``sample``: a share of the full-rank
            number (float in (0, 1]) or a number (int).
        bytes: a budget for the size of the parameters as they are stored: a share of the full-rank
            size (float in (0, 1]) or a number (int).
        seconds: a budget for the time of these layers in a training step.
        of: what the budget is of, and what a share is a share of: the whole ``"model"``, or only
            the ``"layers"`` whose ranks are chosen.
        ranks: ``"energy"``, or ``"uniform"``: the largest share for which all weights can have as
            many parameters, as a share of their own (rounded down), and then what is left.
        calibration: statistics from :func:`dynarank.calibrate`: the share kept is that of the
            energy of the outputs. For weights without statistics, or all of them with None, it is
            that of the weight's own energy.
        multiple_of: ranks are multiples of this number. It is halved for a weight in which this
            leaves fewer than eight choices. None: 8, halved while more than 0.5% of the budget is
            left over or the smallest ranks exceed it.
        layers: a filter ``(module, path) -> bool`` or glob patterns; None: every weight except
            embeddings, output layers and small ones.
        decomposition: the decomposition's name; if it does not truncate optimally, the share kept
            is measured by splitting the weight at every rank. ``"best"``: for each convolution the
            one of svd, separable and tucker that keeps most of the weight at its cost (by the
            weight's own energy, for all three alike); an SVD for other weights.
        timings: a function from path and form to seconds per training step; None: measured now, on
            the model's device.
        planned: forms that other layers will have, whose cost counts in a budget of the model; no
            ranks are chosen for them. Layers that are neither chosen nor planned keep their form.
        use: a trace of the model on a sample (:func:`dynarank.cost.flops.trace`), if there is one
            already; no sample is needed then.

    Raises:
        ValueError: not exactly one budget; a budget below the cost of the smallest ranks, which the
            message gives; no sample where one is needed.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> plan = plan_within(model, params=0.6)
        >>> {path: form.rank for path, form in plan.items()}
        {'0': 16}
    """
    if ranks not in ("energy", "uniform"):
        raise ValueError(f'ranks are "energy" or "uniform", got {ranks!r}')
    sites = [site for site in candidates(model, layers) if not planned.keys() & _names(site)]
    amounts = {"params": params, "flops": flops, "bytes": bytes, "seconds": seconds}
    budget = find_budget(model, sites, BudgetArguments(amounts, of, sample, timings, use), planned)
    steps, least = _STEPS if multiple_of is None else (multiple_of,), 0.0
    shares = _Shares(calibration)
    for step in steps:
        costs = {s.path: _cheaper(s, budget.cost, step, decomposition) for s in sites}
        least = sum(min(own.values()) for own in costs.values())
        if least > budget.room:
            continue
        options = {s.path: _options(s, costs[s.path], ranks, shares) for s in sites}
        found = (choose if ranks == "energy" else choose_evenly)(options, budget.room)
        whole = all(isinstance(option.what, FullRank) for option in found.values())
        left = budget.room - sum(option.cost for option in found.values())
        if step == steps[-1] or whole or left <= _UNSPENT * budget.limit:
            return {path: option.what for path, option in found.items()}
    raise ValueError(budget.refusal(least))


def _names(site: Site) -> set[str]:
    """All paths of a weight."""
    return {path for place in site.places for path in place.paths}


_STEPS = 8, 4, 2, 1  # of ranks, if none is given
_UNSPENT = 0.005  # of a budget; if more is left over, ranks are multiples of less
_BEST = ("svd", "separable", "tucker")  # of a convolution; of a linear weight, the first


def _cheaper(
    site: Site, cost: Callable[[Site, Form], float], multiple_of: int, decomposition: str
) -> dict[Form, float]:
    """The cost of full rank, and of every rank that is cheaper, in each decomposition asked for."""
    names = [decomposition]
    if decomposition == "best":
        names = list(_BEST) if site.spec.dims else ["svd"]
    full = cost(site, FullRank())
    costs: dict[Form, float] = {FullRank(): full}
    for form in (form for name in names for form in _ranks(site, multiple_of, name)):
        if (its := cost(site, form)) < full:
            costs[form] = its
    return costs


def _ranks(site: Site, multiple_of: int, decomposition: str) -> list[LowRank]:
    """The ranks to choose from, in one decomposition."""
    known = site.spec.decomposition(LowRank(1, decomposition))
    step = rank_step(known, site.shape, multiple_of)
    ranks = range(step, known.limit(site.shape) + 1, step)
    return [LowRank(rank, decomposition) for rank in ranks]


def _options(
    site: Site,
    costs: Mapping[Form, float],
    ranks: Literal["energy", "uniform"],
    shares: _Shares,
) -> list[Option[Form]]:
    """The options of a weight: their value is the energy that they keep, or their size."""
    full = Option[Form](FullRank(), costs[FullRank()], 1.0)
    cheaper = [form for form in costs if isinstance(form, LowRank)]
    if not cheaper:
        return [full]
    if ranks == "uniform":
        kept = [site.entries(form) / site.entries(FullRank()) for form in cheaper]
    else:
        kept = [share * _DOUBT for share in shares.kept(site, cheaper)]
    pairs = zip(cheaper, kept, strict=True)
    return [full, *(Option[Form](form, costs[form], value) for form, value in pairs)]


class _Shares:
    """The share of the outputs' energy, or of the weight's, that each form keeps; found once."""

    def __init__(self, calibration: Calibration | None) -> None:
        self._calibration = calibration
        self._curves: dict[tuple[str, bool], list[float]] = {}
        self._splits: dict[tuple[str, Form], float] = {}

    def kept(self, site: Site, forms: Sequence[LowRank], own: bool = False) -> list[float]:
        """The shares kept by forms of one weight; of its ``own`` energy if there are several kinds.

        Args:
            site: the weight.
            forms: in the order of their decompositions.
            own: whether the weight's own energy is asked for though there are statistics.
        """
        if len({form.decomposition for form in forms}) > 1:
            return [share for name in _BEST for share in self.kept(site, _of(forms, name), True)]
        if not forms:
            return []
        if not site.spec.decomposition(forms[0]).truncates_optimally:
            return self._by_split(site, forms)
        if (key := (site.path, own)) not in self._curves:
            self._curves[key] = _curve(spectrum(site, None if own else self._calibration))
        return [self._curves[key][form.resolved_rank - 1] for form in forms]

    def _by_split(self, site: Site, forms: Sequence[LowRank]) -> list[float]:
        new = [form for form in forms if (site.path, form) not in self._splits]
        if new:
            weight = precise(site.effective())
            self._splits |= {(site.path, form): _kept_by_split(site, weight, form) for form in new}
        return [self._splits[site.path, form] for form in forms]


def _curve(values: Tensor) -> list[float]:
    """The share of energy in the first singular values, for each number of them."""
    energies = values.square().sum(0)
    total = energies.sum().item()
    return (energies.cumsum(0) / total).tolist() if total > 0 else [1.0] * len(energies)


def _of(forms: Sequence[LowRank], name: str) -> list[LowRank]:
    return [form for form in forms if form.decomposition == name]


def _kept_by_split(site: Site, weight: Tensor, form: LowRank) -> float:
    d = site.spec.decomposition(form)
    rest = weight - d.join(d.split(weight, form.resolved_rank))
    total = weight.square().sum().item()
    return 1 - rest.square().sum().item() / total if total > 0 else 1.0
