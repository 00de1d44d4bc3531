"""The rank scheduler: asks a schedule once a step and brings the model to its answer."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from dynarank.decompositions import UnfitWeightError
from dynarank.forms import Change, LowRank, Plan
from dynarank.monitors.gradient_window import GradientWindow
from dynarank.monitors.spectral_reading import read_spectra
from dynarank.scheduler.callbacks import CallbackLike, named_callbacks
from dynarank.scheduler.lr_forecast import Forecast
from dynarank.schedules.base import Clock, Decision, Readings, Schedule, as_schedule, ask, step_of
from dynarank.schedules.form_data import form_from_data, form_to_data
from dynarank.schedules.options import check_count
from dynarank.schedules.readings import SpectralReading
from dynarank.schedules.serialization import schedule_from_data, schedule_to_data
from dynarank.schedules.timelines import Phase, timeline
from dynarank.surgery.optimizer_state import Moments, Optimizers, as_list, check_movable
from dynarank.surgery.saving import warn_of_little
from dynarank.surgery.selection import LayerFilter, candidates, find_sites, has_factors, select
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.verbs import apply_plan, change_forms, differences

__all__ = ["RankScheduler", "check_phases", "scheduled_layers"]


class RankScheduler:
    """Changes the forms of layers during training, as an LR scheduler changes the learning rate.

    The constructor applies the schedule's first plan. Call :meth:`step` once after each
    ``optimizer.step()``. A weight that cannot be changed now (not finite, or its decomposition does
    not converge) does not end the run: the change is postponed with a warning and retried after 1,
    2, 4, ... steps.

    Args:
        model: the model; it may be ranked already.
        optimizer: its optimizer, or several.
        schedule: one of :mod:`dynarank.schedules`, or any function ``(clock, readings) -> plan``.
        total_steps: how many optimizer steps the run has.
        layers: the scheduled layers, as a filter ``(module, path) -> bool`` or glob patterns. None:
            the layers that are ranked already; if there are none, all that get cheaper in every
            low-rank phase of the schedule, except embeddings, output layers and small weights
            (``print(dr.survey(model, rank))`` shows which).
        lr_scheduler: the LR scheduler; a copy of it is run ahead to forecast the learning rate. Or
            the learning rates of the run, evenly spaced. None: there is no forecast.
        moments: how the optimizer's moments are converted, see :func:`dynarank.apply_plan`. With
            ``"calibrated"``, or a :class:`~dynarank.GradientWindow` of another length, the last
            gradients of a layer before its change are kept; without any, because the change could
            not be predicted, moments are projected.
        callbacks: called around each change, in the order of the list: ``LRRewarmup``,
            ``BatchNormRecalibration``, ``ActivationAwareTruncation``, a subclass of
            :class:`~dynarank.scheduler.callbacks.Callback`, or a function of the list of changes.

    Raises:
        ValueError: there is no layer to schedule; ``schedule`` or a callback is something else; a
            plan is impossible (unknown layer, rank above a layer's limit); the optimizer's state
            cannot be converted. Every phase that can be predicted is checked before any change.

    Warns:
        UserWarning: no layers are named, and no low-rank phase saves 5% of the model's weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> schedule = dr.schedules.dynamic_rank(rank=2)
        >>> ranks = RankScheduler(model, optimizer, schedule, total_steps=10)
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
        self.schedule = as_schedule(schedule)
        self.total_steps = total_steps = check_count("total_steps", total_steps)
        self.moments: Moments = moments
        if moments == "calibrated":
            self.moments = GradientWindow(model, self.optimizer)
        self.gradients = self.moments if isinstance(self.moments, GradientWindow) else None
        self.forecast = Forecast(lr_scheduler, total_steps)
        self.callbacks = named_callbacks(callbacks)
        self.last_step = 0
        self.decisions: list[Decision] = []
        self.spectra: Mapping[str, SpectralReading] = {}  # as the schedule has just seen them
        self._patience = self._retry_at = 0
        self._plan: Plan | None = None  # as last applied
        self._state = self.schedule.start()
        sites = survey(model)
        scheduled = scheduled_layers(sites, self.schedule, total_steps, layers)
        self._layers = {site.path: site.spec.unit_shape for site in scheduled}
        check_phases(model, phases := self.phases(), sites)
        if layers is None and not has_factors(sites):
            warn_of_little(sites, [phase.plan for phase in phases], stacklevel=2)
        try:
            for one in self.callbacks.values():
                one.on_start(self)
            self._advance(sites)
        except BaseException:
            self.close()
            raise

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the scheduled layers."""
        return tuple(self._layers)

    def phases(self) -> list[Phase]:
        """The phases of the whole run, as far as the current readings tell."""
        return timeline(self.schedule, self._readings(), self.total_steps)

    def step(self) -> list[Change]:
        """Count one optimizer step, bring the model to the next step's plan, return the changes."""
        self.last_step += 1
        for one in self.callbacks.values():
            one.after_step(self)
        self.forecast.watch(self.last_step)
        return self._advance()

    def close(self) -> None:
        """Take every hook off the optimizers, the last callback first; the model stays as it is."""
        for one in reversed(self.callbacks.values()):
            one.close()
        if self.gradients is not None:
            self.gradients.watch(())

    def state_dict(self) -> dict[str, Any]:
        """The position in the run and the forms the layers have, as plain data."""
        paths = {**self._layers, **(self._plan or {})}
        sites = find_sites(self.model, survey(self.model), paths)
        last = {path: site.last_factored_form for path, site in sites.items()}
        return {
            "last_step": self.last_step,
            "total_steps": self.total_steps,
            "patience": self._patience,
            "retry_at": self._retry_at,
            "schedule": dict(self._state),
            "fitted": schedule_to_data(self.schedule) if self.schedule.fitted else None,
            "forecast": self.forecast.state_dict(),
            "callbacks": {n: s for n, one in self.callbacks.items() if (s := one.state_dict())},
            "decisions": [decision.to_data() for decision in self.decisions],
            "last_factored_forms": {p: form_to_data(form) for p, form in last.items() if form},
            "forms": {p: form_to_data(site.form) for p, site in sites.items() if site.form},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position and the forms that the layers had then.

        Load this before the model's and the optimizer's ``state_dict``: structure first, then
        weights. Weights that are not finite are set to zero until then.

        Raises:
            ValueError: the state is of a run of another length or with other layers, or a callback
                that it has state for is missing.
        """
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the saved rank schedule is of a run of {state['total_steps']} steps, this one "
                f"has {self.total_steps}; give the same total_steps"
            )
        if missing := state["callbacks"].keys() - self.callbacks.keys():
            raise ValueError(
                f"the saved run had the callbacks {', '.join(sorted(missing))}, this one has not; "
                "give the same callbacks"
            )
        for name, one in state["callbacks"].items():
            self.callbacks[name].load_state_dict(one)
        for key in ("last_factored_forms", "forms"):  # a deflation without a rank needs both
            self._restore({path: form_from_data(form) for path, form in state[key].items()})
        self.last_step = int(state["last_step"])
        self._patience, self._retry_at = int(state["patience"]), int(state["retry_at"])
        if state["fitted"] is not None:  # fitting again could give another schedule
            self.schedule = schedule_from_data(state["fitted"])
        self._state, self._plan = state["schedule"], None
        self.forecast.load_state_dict(state["forecast"])
        self.decisions = [Decision.from_data(data) for data in state["decisions"]]

    def _restore(self, plan: Plan) -> None:
        """Bring the model to the plan; its weights are loaded afterwards, so they do not matter."""
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

    def _with_spectra(self, readings: Readings, sites: Sequence[Site]) -> Readings:
        """The readings, with the rank metrics of the scheduled layers and the forms they have."""
        own = find_sites(self.model, sites, self._layers)
        values = sys.maxsize if "singular_values" in self.schedule.requires else 0
        # The layers' own forms, not the plan's: a change may be postponed.
        forms = {path: site.form for path, site in own.items() if site.form is not None}
        return replace(readings, forms=forms, spectra=read_spectra(own.values(), values=values))

    def _advance(self, sites: Sequence[Site] | None = None) -> list[Change]:
        """Ask the schedule for a plan, and apply it unless changes are postponed."""
        clock = Clock(min(self.last_step, self.total_steps - 1), self.total_steps)
        readings, every = self._readings(), self.schedule.spectra_every
        if every is not None and self.last_step % max(1, step_of(every, self.total_steps)) == 0:
            sites = survey(self.model) if sites is None else sites
            readings = self._with_spectra(readings, sites)
        self.spectra = readings.spectra
        plan, self._state, decisions = ask(self.schedule, self._state, clock, readings)
        self.decisions += decisions
        changes = self._apply(plan, sites) if self.last_step >= self._retry_at else []
        self._watch_gradients()
        return changes

    def _apply(self, plan: Plan, sites: Sequence[Site] | None) -> list[Change]:
        if plan == self._plan:  # the usual step: no traversal of the model
            return []
        wanted = differences(self.model, plan, sites)
        callbacks = self.callbacks.values() if wanted else ()
        try:
            given = [c for one in callbacks if (c := one.before_change(self, wanted)) is not None]
            if len(given) > 1:
                raise ValueError(f"{len(given)} callbacks calibrate one change; leave one of them")
            changes = change_forms(wanted, self.optimizer, self.moments, *given)
        except UnfitWeightError as error:
            self._put_off(error)
            return []
        self._patience, self._plan = 0, dict(plan)
        for one in callbacks:
            one.after_change(self, changes)
        return changes

    def _watch_gradients(self) -> None:
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
        said = f"no change of form now, next try in {self._patience} steps: {error}"
        warnings.warn(f"step {self.last_step}: {said}", RuntimeWarning, stacklevel=5)


def check_phases(model: nn.Module, phases: Iterable[Phase], sites: Sequence[Site]) -> None:
    """Raise ValueError for a phase whose plan the model, with these sites, cannot follow."""
    for phase in phases:
        try:
            differences(model, phase.plan, sites)
        except ValueError as error:
            raise ValueError(f"from step {phase.start}, {error}") from None


def scheduled_layers(
    sites: Sequence[Site], schedule: Schedule, total_steps: int, layers: LayerFilter = None
) -> list[Site]:
    """The sites that a schedule applies to: see ``layers`` of :class:`RankScheduler`."""
    if layers is not None or has_factors(sites):
        return select(sites, layers)
    able = {s.path: s.spec.unit_shape for s in sites if s.form is not None}
    given: dict[str, set[LowRank]] = {path: set() for path in able}
    for phase in timeline(schedule, Readings(able), total_steps):
        for path, form in phase.plan.items():
            if path in given and isinstance(form, LowRank):  # others are refused with their phase
                given[path].add(form)
    low = set[LowRank]().union(*given.values())
    if not low:
        named = {site.path for site in candidates(sites)}
        return select(sites, lambda module, path: path in named)
    # A layer that is never low-rank itself (an adapter, say) is measured by all low-rank forms.
    cheaper = {f: {s.path for s in select(sites, None, f.rank, f.decomposition)} for f in low}
    paths = {path for path, own in given.items() if all(path in cheaper[f] for f in own or low)}
    return select(sites, lambda module, path: path in paths)
