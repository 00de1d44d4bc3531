"""What a run will cost, before its first step: parameters, FLOPs and memory of each phase."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynarank.cost.dry_run import DryRun, dry_run
from dynarank.cost.flops import Flops, ModelUse, count_flops, trace
from dynarank.cost.schedule import PhaseCost, ScheduleCost, cost_schedule, phases_within
from dynarank.cost.stand_in import on_meta, stand_in
from dynarank.cost.step_memory import StepMemory, step_memory
from dynarank.distributed.unwrap import unwrapped
from dynarank.forms import Plan
from dynarank.planning.estimate_phase import PhaseEstimate
from dynarank.planning.estimate_result import Estimate
from dynarank.scheduler.lr_forecast import Forecast, check_lr_scheduler, unknown_rates
from dynarank.scheduler.scheduled_layers import check_phases, scheduled_layers
from dynarank.schedules.base import Readings, Schedule, as_schedule
from dynarank.schedules.catalog import schedule_name
from dynarank.schedules.options import check_count
from dynarank.surgery.optimizer_state import Optimizers, as_list, check_held
from dynarank.surgery.selection import LayerFilter, select
from dynarank.surgery.sites import current_plan, survey

__all__ = ["estimate", "estimate_phases"]

_ASSUMED = "AdamW, assumed: give optimizer= for the state of yours"


def estimate(
    model: nn.Module,
    batch: Any,
    *,
    schedule: Schedule | None = None,
    total_steps: int | None = None,
    lr_scheduler: Any | Sequence[float] | None = None,
    lr_every: int | None = None,
    optimizer: Optimizers = None,
    layers: LayerFilter = None,
    loss: Callable[[Any], Tensor] | None = None,
    measure: bool = False,
    processes: int | None = None,
) -> Estimate:
    """What a run costs in each phase of a schedule, before its first step; print it as a table.

    Parameters and FLOPs are exact for batches of this shape: a step is one forward and one backward
    pass, 1 multiply-accumulate = 2 FLOPs, matrix products and convolutions. Memory is that of
    parameters, gradients, optimizer state and activations (what autograd saves), in the dtypes that
    the model has; see :class:`~dynarank.cost.step_memory.StepMemory`. Nothing of the caller's is
    changed: model, optimizer, LR scheduler and random states stay as they are.

    Args:
        model: any model, also one on the meta device; ranked or not.
        batch: a batch: a tensor, a tuple or list of positional arguments of the forward pass, or a
            dict of keyword arguments; see :func:`dynarank.layers.running.forward_arguments`.
        schedule: the rank schedule. None: the model as it is, and the rank at which a layer's
            factors cost as much as its weight.
        total_steps: how many optimizer steps the run has; a schedule needs it.
        lr_scheduler: as for :class:`dynarank.RankScheduler`; schedules that follow the learning
            rate need it.
        lr_every: how many optimizer steps pass from one ``lr_scheduler.step()`` to the next: 1, or
            ``len(loader)`` if it is stepped once an epoch. None: what the length of the LR
            scheduler tells.
        optimizer: the optimizer, or several, for the size of their state. None: AdamW is assumed.
        layers: the scheduled layers, as for :class:`dynarank.RankScheduler`.
        loss: a function from the model's output to a scalar; None: the sum of all its
            floating-point tensors.
        measure: whether to train copies for a few steps of each phase, and to measure the time and
            the peak memory of a step on this machine.
        processes: how many processes train together with DDP: the table then shows the bytes that
            they all-reduce, which :meth:`Estimate.to_dict` has always. Everything else is of one
            process, and ``batch`` is its own.

    Raises:
        ValueError: a schedule without ``total_steps``, or an LR scheduler without a schedule; to
            measure a model without values; fewer than one process; what
            :class:`dynarank.RankScheduler` refuses.

    Warns:
        UserWarning: the schedule follows the learning rate, and how often the LR scheduler is
            stepped is not known.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> schedule = dr.schedules.dynamic_rank(8, inflate=0.4, deflate=0.8)
        >>> found = estimate(model, torch.ones(32, 64), schedule=schedule, total_steps=100)
        >>> [(one.start, round(one.cost.relative_training, 3)) for one in found.phases]
        [(0, 0.725), (40, 1.0), (80, 0.925)]
    """
    optimizers, model = as_list(optimizer), unwrapped(model)
    processes = None if processes is None else check_count("processes", processes)
    _check(model, schedule, total_steps, lr_scheduler, measure=measure)
    if optimizers:
        check_lr_scheduler(lr_scheduler, optimizers)
    use = trace(model, batch, loss)
    paths, cost, notes = _planned(model, use, schedule, total_steps, lr_scheduler, lr_every, layers)
    if optimizers:
        check_held((s for s in survey(model) if s.path in paths), optimizers)
    named = " and ".join(type(one).__name__ for one in optimizers) or _ASSUMED
    optimizers = optimizers or _default(model)
    phases = estimate_phases(model, optimizers, cost, batch, loss, measure=measure)
    name = None if schedule is None else schedule_name(as_schedule(schedule))
    kind = type(model).__name__
    return Estimate(kind, name, use, paths, cost, phases, named, total_steps, notes, processes)


def estimate_phases(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    cost: ScheduleCost,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    measure: bool = False,
    counted: bool = True,
) -> tuple[PhaseEstimate, ...]:
    """The phases of a schedule's cost with their memory.

    With ``measure`` also their time, with ``counted`` also their FLOPs by FlopCounterMode.
    """
    known: dict[frozenset[Any], tuple[StepMemory, Flops | None, DryRun | None]] = {}

    def found(phase: PhaseCost) -> tuple[StepMemory, Flops | None, DryRun | None]:
        plan = phase.plan
        memory = step_memory(model, optimizers, plan, batch, loss)
        # Of a budget the FLOPs are known, and the ranks that spend them are not.
        exact = counted and not phase.estimated
        flops = _counted(model, plan, batch, loss) if exact else None
        ran = dry_run(model, optimizers, [plan], batch, loss)[0] if measure else None
        return memory, flops, ran

    for phase in cost.phases:
        known.setdefault(key := _key(phase), known.get(key) or found(phase))
    return tuple(PhaseEstimate(phase, *known[_key(phase)]) for phase in cost.phases)


def _key(phase: PhaseCost) -> frozenset[Any]:
    return frozenset((*phase.plan.items(), phase.estimated))


def _counted(
    model: nn.Module, plan: Plan, batch: Any, loss: Callable[[Any], Tensor] | None
) -> Flops | None:
    """What FlopCounterMode counts on a meta copy; None if the model does not run on one."""
    try:
        return count_flops(stand_in(model, [], plan, meta=True)[0], on_meta(batch), loss)
    except Exception:  # whatever the model does that meta tensors do not allow
        return None


def _planned(
    model: nn.Module,
    use: ModelUse,
    schedule: Schedule | None,
    total_steps: int | None,
    lr_scheduler: Any,
    lr_every: int | None,
    layers: LayerFilter,
) -> tuple[tuple[str, ...], ScheduleCost, tuple[str, ...]]:
    """The paths of the layers to show, the cost of each phase, and what a reader should know."""
    if schedule is None or total_steps is None:
        now: Plan = current_plan(model)
        able = [site for site in survey(model) if site.form is not None]
        paths = [site.path for site in (able if layers is None else select(able, layers))]
        cost = cost_schedule(use, lambda clock, readings: now, paths, total_steps or 1)
        return tuple(paths), cost, ()
    sites, rule = survey(model), as_schedule(schedule)
    chosen = scheduled_layers(sites, rule, total_steps, layers)
    shapes = {site.path: site.spec.unit_shape for site in chosen}
    forecast = Forecast(lr_scheduler, total_steps, lr_every)
    readings = Readings(shapes, forecast=forecast.rates, flops=use.shares(tuple(shapes)))
    check_phases(model, phases_within(use, rule, readings, total_steps), sites)
    if why := unknown_rates(forecast, rule, readings, total_steps):
        warnings.warn(why, UserWarning, stacklevel=3)
    cost = cost_schedule(use, rule, list(shapes), total_steps, forecast=forecast.rates)
    notes = [why or _rates_note(forecast)]
    if rule.requires:
        notes.append(
            "The schedule decides by the layers' spectra during training: the phases hold until "
            "its first decision."
        )
    return tuple(shapes), cost, tuple(note for note in notes if note)


def _rates_note(forecast: Forecast) -> str:
    """How often the LR scheduler is stepped, and how that is known."""
    if forecast.source is None or forecast.every is None:
        return ""
    often = "step" if forecast.every == 1 else f"{forecast.every:g} steps"
    how = f"lr_every={forecast.every:g}" if forecast.told else "by its length"
    return f"{type(forecast.source).__name__} is stepped every {often} ({how})."


def _check(
    model: nn.Module,
    schedule: Schedule | None,
    total_steps: int | None,
    lr_scheduler: object,
    *,
    measure: bool,
) -> None:
    if total_steps is not None:
        check_count("total_steps", total_steps)
    elif schedule is not None:
        raise ValueError(
            "a schedule's phases are steps of a run, and total_steps is not given; give "
            "total_steps=epochs * len(loader)"
        )
    if schedule is None and lr_scheduler is not None:
        raise ValueError(
            "an LR scheduler matters for the transition points of a schedule, and schedule is not "
            "given; give schedule=, or leave lr_scheduler out"
        )
    if any(map(is_lazy, model.parameters())):
        raise ValueError(
            f"{type(model).__name__} has lazy parameters, whose shapes its first batch decides; "
            "run the model on a batch once, then estimate"
        )
    if measure and any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "measure=True trains copies of the model, and its parameters are on the meta device; "
            "give a model with values, or measure=False"
        )


def _default(model: nn.Module) -> list[Optimizer]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.optim.AdamW(trained)] if trained else []
