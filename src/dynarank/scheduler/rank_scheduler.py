"""The rank scheduler: asks a schedule once a step and brings the model to its answer."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from dynarank.allocation.fit_memory import Settled
from dynarank.allocation.fit_schedule import Fitted, fit
from dynarank.decompositions import UnfitWeightError
from dynarank.forms import Change, Plan, form_from_data, form_to_data
from dynarank.monitors.calibration import Calibration
from dynarank.monitors.gradient_window import WINDOW, GradientWindow
from dynarank.monitors.spectral import SpectralMonitor
from dynarank.scheduler.batch_norm import recalibrate_batch_norms
from dynarank.scheduler.lr_forecast import Forecast
from dynarank.scheduler.lr_rewarmup import LRRewarmup
from dynarank.scheduler.targets import check_phase, scheduled_layers
from dynarank.schedules import (
    Budgeted,
    Clock,
    Decision,
    Phase,
    Readings,
    Schedule,
    ask,
    is_stateful,
    start,
    step_of,
    timeline,
)
from dynarank.schedules.readings import SpectralReading
from dynarank.schedules.serialization import schedule_from_data, schedule_to_data
from dynarank.surgery.optimizer_state import Moments, Optimizers, as_list, check_movable
from dynarank.surgery.selection import LayerFilter, find_sites
from dynarank.surgery.sites import survey
from dynarank.surgery.verbs import apply_plan, change_forms, differences, truncates

__all__ = ["RankScheduler"]


class RankScheduler:
    """Changes layers' forms during training, as ``torch.optim.lr_scheduler`` does the LR.

    The model is at the schedule's first plan as soon as the scheduler exists. Call :meth:`step`
    once after each ``optimizer.step()``; a gradient-accumulation step that does not call the
    optimizer does not call it either.

    A weight that cannot be changed at the moment (not finite, no convergence) does not end the
    run: the change is put off with a warning and tried again after 1, 2, 4, ... steps.

    Args:
        model: the model; it may be ranked already.
        optimizer: its optimizer, or several.
        schedule: any function ``(clock, readings) -> plan``, or one of :mod:`dynarank.schedules`.
        total_steps: how many optimizer steps the run has.
        layers: the layers under the schedule, a filter ``(module, path) -> bool`` or glob patterns.
            None: those that are ranked already, or, if none is, all that get cheaper in every
            low-rank phase of the schedule.
        moments: what becomes of the optimizer's moments, see :func:`dynarank.apply_plan`. Under
            ``"calibrated"`` the gradients of the layers that will change are kept for the last
            ``calibration_steps`` before, see :class:`~dynarank.GradientWindow`; layers whose
            change could not be foreseen that early are calibrated by the gradients there are, or,
            without any, projected.
        calibration_steps: how far ahead to look and how many gradients to keep.
        sample: a batch, as :func:`dynarank.cost.trace` takes it; for schedules within a budget.
        lr_scheduler: the learning rate's scheduler, of which a copy is run ahead to foresee when
            the rate will fall; or the rates of the run at equal distances. None: the rate is
            followed as it comes.
        rewarm: warm the learning rate up again over so many steps after each change.
        renew: called after weights have become low-rank, for batches from which the running
            statistics of batch norms are taken anew, see
            ``recalibrate_batch_norms``; None: they follow by themselves.
        calibrate: called right before weights become low-rank, and only then, for what a few
            batches tell about them: ``lambda: dr.calibrate(model, batches)``. None: they are
            truncated plainly.
        on_change: called with the list of changes after each change of plan.

    Raises:
        ValueError: no layer to schedule; a plan of the schedule's that cannot be (unknown layer,
            rank above a layer's limit); an optimizer whose moments cannot be moved. Every phase
            that can be foreseen is checked here, before anything changes.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> from dynarank.schedules import dynamic_rank
        >>> ranks = RankScheduler(model, optimizer, dynamic_rank(2), total_steps=10)
        >>> for _ in range(5):
        ...     optimizer.step()
        ...     changes = ranks.step()
        >>> model[0].form
        FullRank()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        schedule: Schedule | Budgeted,
        total_steps: int,
        *,
        layers: LayerFilter = None,
        sample: Any = None,
        lr_scheduler: Any | Sequence[float] | None = None,
        moments: Moments = "project",
        rewarm: int = 0,
        renew: Callable[[], Iterable[Any]] | None = None,
        calibrate: Callable[[], Calibration] | None = None,
        calibration_steps: int = WINDOW,
        on_change: Callable[[list[Change]], None] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizers = as_list(optimizer)
        check_movable(optimizers, moments)
        self.total_steps = total_steps
        self.moments: Moments = moments
        self.renew, self.calibrate, self.on_change = renew, calibrate, on_change
        self.gradients = moments if isinstance(moments, GradientWindow) else None
        if moments == "calibrated":
            self.gradients = GradientWindow(model, optimizers, length=calibration_steps)
        self.forecast = Forecast(lr_scheduler, total_steps)
        self.rewarm = LRRewarmup(optimizers, rewarm)
        self.fitted: Fitted | Settled | None = None
        if isinstance(schedule, Budgeted):
            self.fitted = self._fit(schedule, sample, layers)
            schedule = self.fitted.schedule(self.forecast.rates)
        self.schedule: Schedule = schedule
        self.last_step = 0
        self.decisions: list[Decision] = []
        self.spectra: Mapping[str, SpectralReading] = {}  # as the schedule has just seen them
        self._patience = self._retry_at = 0
        self._plan: Plan | None = None  # as last applied
        self._state = start(schedule)
        sites = scheduled_layers(model, schedule, total_steps, layers)
        self._layers = {site.path: site.spec.unit_shape for site in sites}
        values = sys.maxsize if getattr(schedule, "needs_values", False) else 0
        self._monitor = SpectralMonitor(model, layers=lambda _, p: p in self._layers, values=values)
        for phase in self.phases():
            check_phase(phase, model)
        self._advance()

    def _fit(self, wish: Budgeted, sample: Any, layers: LayerFilter) -> Fitted | Settled:
        run, rates = (self.model, self.optimizer, sample, self.total_steps), self.forecast.rates
        return fit(wish, *run, forecast=rates, layers=layers)

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the layers under the schedule."""
        return tuple(self._layers)

    def phases(self) -> list[Phase]:
        """The phases of the whole run, as far as today's readings tell."""
        return timeline(self.schedule, self._readings(), self.total_steps)

    def step(self) -> list[Change]:
        """Count one optimizer step and bring the model to the plan for the next.

        Returns:
            The changes made, most often none.
        """
        self.last_step += 1
        self.rewarm.advance()
        if self.forecast.watch(self.last_step) and self.fitted is not None:
            self.schedule = self.fitted.schedule(self.forecast.rates)
        return self._advance()

    def state_dict(self) -> dict[str, Any]:
        """The position in the run and the forms the layers have, as plain data."""
        sites = find_sites(self.model, survey(self.model), {**self._layers, **(self._plan or {})})
        last_factored_forms = {path: site.last_factored_form for path, site in sites.items()}
        return {
            "last_step": self.last_step,
            "total_steps": self.total_steps,
            "patience": self._patience,
            "retry_at": self._retry_at,
            "schedule": dict(self._state),
            "fitted": schedule_to_data(self.schedule) if self.fitted else None,
            "forecast": self.forecast.state_dict(),
            "rewarmed": self.rewarm.done,
            "decisions": [decision.to_data() for decision in self.decisions],
            "forms": {path: form_to_data(site.form) for path, site in sites.items() if site.form},
            "last_factored_forms": {
                path: form_to_data(home) for path, home in last_factored_forms.items() if home
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position and give the layers the forms they had there.

        Load this before the model's and the optimizer's ``state_dict``: structure first, then
        weights. Values that are not finite, about to be replaced, are set to zero on the way.

        Raises:
            ValueError: the state is of a run of another length, or of other layers.
        """
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the saved rank schedule is of a run of {state['total_steps']} steps, this one "
                f"has {self.total_steps}; give the same total_steps"
            )
        for key in (
            "last_factored_forms",
            "forms",
        ):  # the last form with factors first: deflate returns to it
            plan = {path: form_from_data(data) for path, data in state[key].items()}
            self._restore(plan)
        self.last_step = int(state["last_step"])
        self._patience, self._retry_at = int(state["patience"]), int(state["retry_at"])
        if state["fitted"] is not None:  # seconds would be measured otherwise now
            self.schedule = cast(Schedule, schedule_from_data(state["fitted"]))
        self._state = state["schedule"]
        self.forecast.load_state_dict(state["forecast"])
        self.rewarm.done = int(state["rewarmed"])
        self.decisions = [Decision.from_data(data) for data in state["decisions"]]
        self._plan = None

    def _restore(self, plan: Plan) -> None:
        try:
            apply_plan(self.model, plan, optimizer=self.optimizer, moments="reset")
        except UnfitWeightError:
            for site in find_sites(self.model, survey(self.model), plan).values():
                for parameter in site.parameters().values():
                    parameter.data.nan_to_num_(0, 0, 0)
            apply_plan(self.model, plan, optimizer=self.optimizer, moments="reset")

    def _readings(self) -> Readings:
        one = self.optimizer[0] if len(self.optimizer) == 1 else None
        rate = float(one.param_groups[0]["lr"]) if one else None
        return Readings(self._layers, rate, self.forecast.rates, self._plan or {})

    def _read_spectra(self, readings: Readings) -> Readings:
        """The readings, with the rank health of the layers if the schedule is to see it now."""
        every = self.schedule.spectra_every if is_stateful(self.schedule) else None
        if every is None or self.last_step % max(1, step_of(every, self.total_steps)):
            return readings
        # The layers' own forms, not the plan's: a change may be put off.
        sites = find_sites(self.model, survey(self.model), self._layers)
        forms = {path: site.form for path, site in sites.items() if site.form is not None}
        return replace(readings, forms=forms, spectra=self._monitor.read())

    def _advance(self) -> list[Change]:
        """Ask the schedule, and bring the model to its answer unless that is put off."""
        clock = Clock(min(self.last_step, self.total_steps - 1), self.total_steps)
        readings = self._read_spectra(self._readings())
        self.spectra = readings.spectra
        plan, self._state, decisions = ask(self.schedule, self._state, clock, readings)
        self.decisions += decisions
        changes = self._apply(plan) if self.last_step >= self._retry_at else []
        self._foresee()
        return changes

    def _apply(self, plan: Plan) -> list[Change]:
        if plan == self._plan:  # the usual step: no traversal of the model
            return []
        wanted = differences(self.model, plan)
        lossy = truncates(wanted)
        try:
            changes = change_forms(
                wanted,
                self.optimizer,
                self.moments if self.gradients is None else self.gradients,
                self.calibrate() if self.calibrate and lossy else None,
            )
        except UnfitWeightError as error:
            self._put_off(error)
            return []
        first = self.last_step == 0
        self._patience, self._plan = 0, dict(plan)
        if changes and not first:
            self.rewarm.restart()
        if changes and lossy and self.renew and not first:
            recalibrate_batch_norms(self.model, self.renew())
        if changes and self.on_change is not None:
            self.on_change(changes)
        return changes

    def _foresee(self) -> None:
        """Keep the gradients of the layers that will have another form before long."""
        if self.gradients is None or self.moments != "calibrated":
            return
        ahead = min(self.last_step + self.gradients.length, self.total_steps - 1)
        plan = ask(
            self.schedule, self._state, Clock(ahead, self.total_steps), self._readings()
        ).plan
        now = self._plan or {}
        self.gradients.watch(path for path, form in plan.items() if form != now.get(path, form))

    def _put_off(self, error: UnfitWeightError) -> None:
        self._patience = max(1, 2 * self._patience)
        self._retry_at = self.last_step + self._patience
        warnings.warn(
            f"step {self.last_step}: no change of form now, next try in {self._patience} steps: "
            f"{error}",
            RuntimeWarning,
            stacklevel=5,
        )
