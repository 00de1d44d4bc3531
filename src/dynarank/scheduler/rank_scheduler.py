"""The rank scheduler: asks a schedule once a step and brings the model to its answer."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from dynarank.decompositions import UnfitWeightError
from dynarank.forms import Change, Plan
from dynarank.monitors.gradient_window import GradientWindow
from dynarank.monitors.spectral import SpectralMonitor
from dynarank.scheduler.callbacks import (
    CallbackLike,
    as_callback,
    calibration_for,
    callback_states,
    load_callback_states,
)
from dynarank.scheduler.lr_forecast import Forecast
from dynarank.scheduler.saved_forms import forms_to_data, restore_forms
from dynarank.scheduler.targets import check_phases, scheduled_layers
from dynarank.schedules.base import Clock, Decision, Readings, Schedule, as_schedule, step_of
from dynarank.schedules.readings import SpectralReading
from dynarank.schedules.serialization import schedule_from_data, schedule_to_data
from dynarank.schedules.timelines import Phase, timeline
from dynarank.surgery.optimizer_state import Moments, Optimizers, as_list, check_movable
from dynarank.surgery.selection import LayerFilter, find_sites
from dynarank.surgery.sites import survey
from dynarank.surgery.verbs import apply_plan

__all__ = ["RankScheduler"]


class RankScheduler:
    """Changes layers' forms during training, as ``torch.optim.lr_scheduler`` does the LR.

    The model is at the schedule's first plan as soon as the scheduler exists. Call :meth:`step`
    once after each ``optimizer.step()``. A weight that cannot be changed now (not finite, no
    convergence) does not end the run: the change is put off with a warning and tried again after
    1, 2, 4, ... steps.

    Args:
        model: the model; it may be ranked already.
        optimizer: its optimizer, or several.
        schedule: one of :mod:`dynarank.schedules`, or any function ``(clock, readings) -> plan``.
        total_steps: how many optimizer steps the run has.
        layers: the layers under the schedule, a filter ``(module, path) -> bool`` or glob patterns.
            None: those that are ranked already, or, if none is, all that get cheaper in every
            low-rank phase of the schedule.
        lr_scheduler: the learning rate's scheduler, of which a copy is run ahead to foresee when
            the rate will fall; or the rates of the run at equal distances. None: the rate is
            followed as it comes.
        moments: what becomes of the optimizer's moments, see :func:`dynarank.apply_plan`. Under
            ``"calibrated"``, or a :class:`~dynarank.GradientWindow` of your own length, the last
            gradients before a change are kept of the layers that will change; without any, because
            a change could not be foreseen, moments are projected.
        callbacks: called in this order around changes: a
            :class:`~dynarank.scheduler.callbacks.Callback`, such as ``LRRewarmup``,
            ``BatchNormRecalibration`` or ``ActivationAwareTruncation``, or a function, which is
            called with the list of changes after each change of plan.

    Raises:
        ValueError: no layer to schedule; something that is no schedule or callback; a plan of the
            schedule's that cannot be (unknown layer, rank above a layer's limit); an optimizer
            whose moments cannot be moved. Every phase that can be foreseen is checked here, before
            anything changes.

    Example:
        >>> import torch
        >>> from dynarank.schedules import dynamic_rank
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
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
        schedule: Schedule,
        total_steps: int,
        *,
        layers: LayerFilter = None,
        lr_scheduler: Any | Sequence[float] | None = None,
        moments: Moments = "project",
        callbacks: Sequence[CallbackLike] = (),
    ) -> None:
        self.model, self.optimizer = model, as_list(optimizer)
        check_movable(self.optimizer, moments)
        self.schedule, self.total_steps = as_schedule(schedule), total_steps
        self.moments: Moments = moments
        if moments == "calibrated":
            self.moments = GradientWindow(model, self.optimizer)
        self.gradients = self.moments if isinstance(self.moments, GradientWindow) else None
        self.forecast = Forecast(lr_scheduler, total_steps)
        self.callbacks = [as_callback(one) for one in callbacks]
        self.last_step = 0
        self.decisions: list[Decision] = []
        self.spectra: Mapping[str, SpectralReading] = {}  # as the schedule has just seen them
        self._patience = self._retry_at = 0
        self._plan: Plan | None = None  # as last applied
        self._state = self.schedule.start()
        sites = scheduled_layers(model, self.schedule, total_steps, layers)
        self._layers = {site.path: site.spec.unit_shape for site in sites}
        values = sys.maxsize if "singular_values" in self.schedule.requires else 0
        self._monitor = SpectralMonitor(model, layers=lambda _, p: p in self._layers, values=values)
        check_phases(self.phases(), model)
        try:
            for one in self.callbacks:
                one.on_start(self)
            self._advance()
        except BaseException:
            self.close()
            raise

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
        for one in self.callbacks:
            one.after_step(self)
        self.forecast.watch(self.last_step)
        return self._advance()

    def close(self) -> None:
        """Take every hook off the optimizers, the last callback first; the model stays as it is."""
        for one in reversed(self.callbacks):
            one.close()
        if self.gradients is not None:
            self.gradients.watch(())

    def state_dict(self) -> dict[str, Any]:
        """The position in the run and the forms the layers have, as plain data."""
        return {
            "last_step": self.last_step,
            "total_steps": self.total_steps,
            "patience": self._patience,
            "retry_at": self._retry_at,
            "schedule": dict(self._state),
            "fitted": schedule_to_data(self.schedule) if self.schedule.fitted else None,
            "forecast": self.forecast.state_dict(),
            "callbacks": callback_states(self.callbacks),
            "decisions": [decision.to_data() for decision in self.decisions],
            **forms_to_data(self.model, {**self._layers, **(self._plan or {})}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position and give the layers the forms they had there.

        Load this before the model's and the optimizer's ``state_dict``: structure first, then
        weights. Values that are not finite, about to be replaced, are set to zero on the way.

        Raises:
            ValueError: the state is of a run of another length, of other layers, or of callbacks
                that are not there.
        """
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the saved rank schedule is of a run of {state['total_steps']} steps, this one "
                f"has {self.total_steps}; give the same total_steps"
            )
        load_callback_states(self.callbacks, state["callbacks"])
        restore_forms(self.model, self.optimizer, state)
        self.last_step = int(state["last_step"])
        self._patience, self._retry_at = int(state["patience"]), int(state["retry_at"])
        if state["fitted"] is not None:  # seconds would be measured otherwise now
            self.schedule = schedule_from_data(state["fitted"])
        self._state, self._plan = state["schedule"], None
        self.forecast.load_state_dict(state["forecast"])
        self.decisions = [Decision.from_data(data) for data in state["decisions"]]

    def _readings(self) -> Readings:
        one = self.optimizer[0] if len(self.optimizer) == 1 else None
        rate = float(one.param_groups[0]["lr"]) if one else None
        return Readings(self._layers, rate, self.forecast.rates, self._plan or {})

    def _read_spectra(self, readings: Readings) -> Readings:
        """The readings, with the rank metrics of the layers if the schedule is to see them now."""
        every = self.schedule.spectra_every if self.schedule.requires else None
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
        plan, self._state, decisions = self.schedule.update(self._state, clock, readings)
        self.decisions += decisions
        changes = self._apply(plan) if self.last_step >= self._retry_at else []
        self._foresee()
        return changes

    def _apply(self, plan: Plan) -> list[Change]:
        if plan == self._plan:  # the usual step: no traversal of the model
            return []
        try:
            changes = apply_plan(
                self.model,
                plan,
                optimizer=self.optimizer,
                moments=self.moments,
                calibration=calibration_for(self.callbacks, self, plan),
            )
        except UnfitWeightError as error:
            self._put_off(error)
            return []
        self._patience, self._plan = 0, dict(plan)
        for one in self.callbacks if changes else ():
            one.after_change(self, changes)
        return changes

    def _foresee(self) -> None:
        """Keep the gradients of the layers that will have another form before long."""
        if self.gradients is None:
            return
        ahead = min(self.last_step + self.gradients.length, self.total_steps - 1)
        clock, readings = Clock(ahead, self.total_steps), self._readings()
        plan = self.schedule.update(self._state, clock, readings).plan
        now = self._plan or {}
        self.gradients.watch(path for path, form in plan.items() if form != now.get(path, form))

    def _put_off(self, error: UnfitWeightError) -> None:
        self._patience = max(1, 2 * self._patience)
        self._retry_at = self.last_step + self._patience
        said = f"no change of form now, next try in {self._patience} steps"
        warnings.warn(f"step {self.last_step}: {said}: {error}", RuntimeWarning, stacklevel=5)
