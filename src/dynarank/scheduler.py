"""The rank scheduler: asks a schedule once a step and brings the model to its answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dynarank.calibration import Calibration
from dynarank.decompositions import UnfitWeightError
from dynarank.forms import Change, FullRank, LowRank, Plan, form_from_data, form_to_data
from dynarank.gradients import WINDOW, Gradients
from dynarank.schedules import Clock, Phase, RankSchedule, Readings, timeline
from dynarank.selection import LayerFilter, find_sites, select
from dynarank.surgery import apply_plan, truncates
from dynarank.survey import Site, survey
from dynarank.transport import Moments, Optimizers, as_list, check_movable

__all__ = ["RankScheduler", "scheduled_layers"]


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
        schedule: any function ``(clock, readings) -> plan``, such as those of
            :mod:`dynarank.schedules`.
        total_steps: how many optimizer steps the run has.
        layers: the layers under the schedule, a filter ``(module, path) -> bool`` or glob patterns.
            None: those that are ranked already, or, if none is, all that get cheaper in every
            low-rank phase of the schedule.
        moments: what becomes of the optimizer's moments, see :func:`dynarank.apply_plan`. Under
            ``"calibrated"`` the gradients of the layers that will change are kept for the last
            ``calibration_steps`` before, see :class:`~dynarank.gradients.Gradients`; layers whose
            change could not be foreseen that early are calibrated by the gradients there are, or,
            without any, projected.
        calibration_steps: how far ahead to look and how many gradients to keep.
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
        schedule: RankSchedule,
        total_steps: int,
        *,
        layers: LayerFilter = None,
        moments: Moments = "project",
        calibrate: Callable[[], Calibration] | None = None,
        calibration_steps: int = WINDOW,
        on_change: Callable[[list[Change]], None] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizers = as_list(optimizer)
        check_movable(optimizers, moments)
        self.schedule = schedule
        self.total_steps = total_steps
        self.moments: Moments = moments
        self.calibrate = calibrate
        self.gradients = moments if isinstance(moments, Gradients) else None
        if moments == "calibrated":
            self.gradients = Gradients(model, optimizers, length=calibration_steps)
        self.on_change = on_change
        self.last_step = 0
        self._patience = 0
        self._retry_at = 0
        self._plan: Plan | None = None  # as last applied
        sites = scheduled_layers(model, schedule, total_steps, layers)
        self._layers = {site.path: site.shape for site in sites}
        for phase in self.phases():
            _check_phase(phase, model)
        self._apply()
        self._foresee()

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
        changes = self._apply() if self.last_step >= self._retry_at else []
        self._foresee()
        return changes

    def state_dict(self) -> dict[str, Any]:
        """The position in the run and the forms the layers have, as plain data."""
        sites = find_sites(self.model, {**self._layers, **(self._plan or {})})
        homes = {path: site.home for path, site in sites.items()}
        return {
            "last_step": self.last_step,
            "total_steps": self.total_steps,
            "patience": self._patience,
            "retry_at": self._retry_at,
            "forms": {path: form_to_data(site.form) for path, site in sites.items() if site.form},
            "homes": {path: form_to_data(home) for path, home in homes.items() if home},
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
        for key in ("homes", "forms"):  # the last form with factors first: deflate returns to it
            plan = {path: form_from_data(data) for path, data in state[key].items()}
            self._restore(plan)
        self.last_step = int(state["last_step"])
        self._patience, self._retry_at = int(state["patience"]), int(state["retry_at"])
        self._plan = None

    def _restore(self, plan: Plan) -> None:
        try:
            apply_plan(self.model, plan, optimizer=self.optimizer, moments="reset")
        except UnfitWeightError:
            for site in find_sites(self.model, plan).values():
                for parameter in site.parameters().values():
                    parameter.data.nan_to_num_(0, 0, 0)
            apply_plan(self.model, plan, optimizer=self.optimizer, moments="reset")

    def _readings(self) -> Readings:
        one = self.optimizer[0] if len(self.optimizer) == 1 else None
        return Readings(self._layers, float(one.param_groups[0]["lr"]) if one else None)

    def _apply(self) -> list[Change]:
        clock = Clock(min(self.last_step, self.total_steps - 1), self.total_steps)
        plan = self.schedule(clock, self._readings())
        if plan == self._plan:  # the usual step: no traversal of the model
            return []
        try:
            known = self.calibrate() if self.calibrate and truncates(self.model, plan) else None
            changes = apply_plan(
                self.model,
                plan,
                optimizer=self.optimizer,
                moments=self.moments if self.gradients is None else self.gradients,
                calibration=known,
            )
        except UnfitWeightError as error:
            self._put_off(error)
            return []
        self._patience, self._plan = 0, dict(plan)
        if changes and self.on_change is not None:
            self.on_change(changes)
        return changes

    def _foresee(self) -> None:
        """Keep the gradients of the layers that will have another form before long."""
        if self.gradients is None or self.moments != "calibrated":
            return
        ahead = min(self.last_step + self.gradients.length, self.total_steps - 1)
        plan = self.schedule(Clock(ahead, self.total_steps), self._readings())
        now = self._plan or {}
        self.gradients.watch(path for path, form in plan.items() if form != now.get(path, form))

    def _put_off(self, error: UnfitWeightError) -> None:
        self._patience = max(1, 2 * self._patience)
        self._retry_at = self.last_step + self._patience
        warnings.warn(
            f"step {self.last_step}: no change of form now, next try in {self._patience} steps: "
            f"{error}",
            RuntimeWarning,
            stacklevel=4,
        )


def scheduled_layers(
    model: nn.Module, schedule: RankSchedule, total_steps: int, layers: LayerFilter = None
) -> list[Site]:
    """The layers a schedule is for: see ``layers`` of :class:`RankScheduler`."""
    ranked = any(site.home is not None for site in survey(model))
    if layers is not None or ranked:
        return select(model, layers)
    able = {s.path: s.shape for s in survey(model) if s.form is not None}
    forms = {
        form: None
        for phase in timeline(schedule, Readings(able), total_steps)
        for form in phase.plan.values()
    }
    low = [form for form in forms if isinstance(form, LowRank)]
    if not low:
        return select(model, lambda module, path: path in able)
    cheaper = ({s.path for s in select(model, None, f.rank, f.decomposition)} for f in low)
    paths = set.intersection(*cheaper)
    return select(model, lambda module, path: path in paths)


def _check_phase(phase: Phase, model: nn.Module) -> None:
    """Raise for a plan that no weights could make possible.

    Raises:
        ValueError: an unknown layer or decomposition, a rank above the layer's limit.
    """
    for path, site in find_sites(model, phase.plan).items():
        form = phase.plan[path]
        if isinstance(form, FullRank):
            continue
        try:
            site.spec.resolve(form)
        except ValueError as error:
            raise ValueError(f"from step {phase.start}, layer {path!r}: {error}") from None
