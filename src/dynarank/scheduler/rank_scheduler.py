"""The rank scheduler: asks a schedule once a step and brings the model to its answer."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.cost.budget import stand_in
from dynarank.decompositions import LinAlgError, UnfitWeightError
from dynarank.decompositions.truncation import ActivationStats
from dynarank.distributed.processes import Processes, is_independent, processes_of
from dynarank.distributed.unwrap import check_wrappers, unwrapped
from dynarank.distributed.wrappers import one_scan
from dynarank.form_data import form_to_data, request_to_data
from dynarank.forms import Change, Form, Plan, Request, Within
from dynarank.monitors.gradient_window import GradientWindow
from dynarank.monitors.spectral_reading import read_spectra
from dynarank.scheduler.averages import Averages, running_statistics
from dynarank.scheduler.batch_norm import recalibrate_batch_norms
from dynarank.scheduler.budgets import Batches, Budgets, Resolved
from dynarank.scheduler.callbacks import (
    CallbackLike,
    load_callback,
    may_prepare,
    named_callbacks,
    stateful_callbacks,
)
from dynarank.scheduler.copies import check_picklable
from dynarank.scheduler.lr_forecast import Forecast, check_lr_scheduler, unknown_rates
from dynarank.scheduler.lr_interval import WAYS
from dynarank.scheduler.postponed import Postponed, change_fit_layers
from dynarank.scheduler.real_steps import RealSteps
from dynarank.scheduler.saved_state import SavedState, schedule_identity
from dynarank.scheduler.scheduled_layers import (
    begun_at,
    check_changes,
    check_phases,
    named_in,
    scheduled_layers,
    with_known_forms,
)
from dynarank.schedules.base import (
    Answer,
    Clock,
    Decision,
    RankSchedule,
    Readings,
    Schedule,
    as_schedule,
    ask,
    step_of,
)
from dynarank.schedules.options import check_count
from dynarank.schedules.readings import SpectralReading
from dynarank.schedules.timelines import Phase, timeline
from dynarank.surgery.edit import restore_on_exit
from dynarank.surgery.guard import Guard
from dynarank.surgery.loading import follow_loads, forms_loaded, loaded_since
from dynarank.surgery.optimizer_signature import sign_states, unsign_states
from dynarank.surgery.optimizer_state import (
    Moments,
    Optimizers,
    as_list,
    check_followable,
    check_held,
    check_movable,
)
from dynarank.surgery.own_references import wrapped
from dynarank.surgery.replaced import forget_replaced
from dynarank.surgery.restore import restore_forms
from dynarank.surgery.saving import warn_of_little
from dynarank.surgery.selection import LayerFilter, find_sites, has_factors
from dynarank.surgery.sharded import check_moments, check_order
from dynarank.surgery.shared_edits import fit_everywhere
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.transaction import differences, truncates
from dynarank.surgery.unfollowed import LeftCopies

__all__ = ["RankScheduler"]


class RankScheduler:
    """Changes the forms of layers during training, as an LR scheduler changes the learning rate.

    The constructor applies the schedule's first plan, or goes on from a saved ``state``. Call
    :meth:`step` once a batch, after ``optimizer.step()``: steps that an optimizer took are counted,
    so gradients may be accumulated, and steps skipped. A layer that cannot be changed now (its
    weight or optimizer state is not finite, its decomposition does not converge, or it was pruned
    or got gradient hooks meanwhile) does not end the run or hold back the others: its change is
    postponed with a warning and retried after 1, 2, 4, ... steps, at most 1% of the run (within 8
    and 64 steps), and once more at the last step.

    Args:
        model: the model, wrapped (DDP, ``torch.compile``, Lightning Fabric's) or not; it may be
            ranked already. :attr:`model` is the one inside, and paths are those in it.
        optimizer: its optimizer, or several; wrapped by Accelerate or Lightning or not.
        schedule: one of :mod:`dynarank.schedules`, or any function ``(clock, readings) -> plan``.
        total_steps: how many optimizer steps the run has.
        layers: the scheduled layers, as a filter ``(module, path) -> bool`` or glob patterns. None:
            the layers that are ranked already; if there are none, all that get cheaper in every
            low-rank phase of the schedule, except embeddings, output layers and small weights
            (``print(dr.survey(model, rank))`` shows which).
        lr_scheduler: the LR scheduler, wrapped by a trainer or not; a copy of it is run ahead to
            forecast the learning rate. Or the learning rates of the run, evenly spaced. None: there
            is no forecast.
        lr_every: how many optimizer steps pass from one ``lr_scheduler.step()`` to the next: 1, or
            ``len(loader)`` if it is stepped once an epoch. None: found out when it is first
            stepped, unless the length of the LR scheduler tells before.
        moments: how the optimizer's moments are converted, see :func:`dynarank.apply_plan`. With
            ``"calibrated"``, or a ``GradientWindow`` of another length, the last
            gradients of a layer before its change are kept; without any, because the change could
            not be predicted, moments are projected.
        batches: a function that returns a few training batches, as :func:`dynarank.calibrate` takes
            them. On these the schedule's budgets (:class:`dynarank.Within`) are measured, and at
            each truncation layers are cut such that their outputs change least and BatchNorm is
            recalibrated, in one transaction. None: budgets are measured on the last 8 batches of
            training, which a hook on the model keeps, and checked after the first step; other
            truncations see no data.
        callbacks: called around each change, in the order of the list: ``LRRewarmup``,
            ``BatchNormRecalibration``, ``ActivationAwareTruncation``, a subclass of
            :class:`~dynarank.scheduler.callbacks.Callback`, or a function of the list of changes.
        state: what :meth:`state_dict` returned: the run goes on from there. It is loaded as by
            :meth:`load_state_dict`, in place of the first plan; the layers are those of the state
            if none are named.

    Raises:
        ValueError: there is no layer to schedule; ``schedule`` or a callback is something else; a
            plan is impossible (unknown layer, rank above a layer's limit); a layer trains in no
            optimizer or in two, or the optimizer's state cannot be converted (by the first step,
            if it is not an optimizer of torch); a layer that is to change has gradient hooks (and
            no callback of the user's may take them off before), or the optimizer keeps it where it
            could not follow. Every phase that can be predicted is checked before any change.

    Warns:
        UserWarning: no layers are named, and no low-rank phase saves 5% of the model's weights.
        RuntimeWarning: the LR scheduler is stepped at other steps than ``lr_every`` says.

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
        lr_every: int | None = None,
        moments: Moments = "project",
        batches: Batches | None = None,
        callbacks: Sequence[CallbackLike] = (),
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check_wrappers(model)
        self.model, self.optimizer = (model := unwrapped(model)), as_list(optimizer)
        self._independent = is_independent()
        self._processes: Processes | None = None
        given = schedule, total_steps, lr_scheduler, lr_every, moments, batches, callbacks
        self.processes.attempt("a RankScheduler", lambda: self._take(*given))
        self.last_step = 0
        self.decisions: list[Decision] = []
        self.spectra: Mapping[str, SpectralReading] = {}  # as the schedule has just seen them
        self._request: Request | None = None  # the schedule's last answer
        self._plan: Plan | None = None  # its forms, as last applied, but for what is postponed
        self._seed = self.processes.from_first("the seed", torch.initial_seed())
        self._forms_loaded = forms_loaded()
        self._states_checked = self._told_of_rates = False
        self._left: LeftCopies | None = None
        sites = survey(model)
        check_moments(sites, moments)
        self._agree(lambda: self._choose_layers(sites, layers, state))
        self.averages = Averages()
        self._guard = Guard()
        self._steps = RealSteps(self.optimizer, self._guard)
        try:
            self.processes.attempt("a RankScheduler", self._prepare)
            if state is None:
                self._advance(sites)
            else:
                self.load_state_dict(state)
            follow_loads(model)
            sign_states(model, self.optimizer)
        except BaseException:
            self.close()
            raise

    def _take(
        self,
        schedule: Schedule,
        total_steps: int,
        lr_scheduler: Any | Sequence[float] | None,
        lr_every: int | None,
        moments: Moments,
        batches: Batches | None,
        callbacks: Sequence[CallbackLike],
    ) -> None:
        """Check and keep what the constructor was given."""
        check_movable(self.optimizer, moments)
        self.schedule = as_schedule(schedule)
        self.total_steps = total_steps = check_count("total_steps", total_steps)
        self.moments: Moments = moments
        if moments == "calibrated":
            self.moments = GradientWindow(self.model, self.optimizer)
        self.gradients = self.moments if isinstance(self.moments, GradientWindow) else None
        check_lr_scheduler(lr_scheduler, self.optimizer)
        self.forecast = Forecast(lr_scheduler, total_steps, lr_every)
        self.callbacks = named_callbacks(callbacks)
        self._postponed = Postponed(total_steps)
        self._budgets = Budgets(self.model, batches)
        self._state = self.schedule.start()

    def _prepare(self) -> None:
        """What follows the checks and comes before the first plan."""
        self._budgets.expect(self.schedule, self._phases_of)
        for one in self.callbacks.values():
            one.on_start(self)

    def _choose_layers(
        self, sites: Sequence[Site], layers: LayerFilter, state: Mapping[str, Any] | None
    ) -> None:
        """Find the scheduled layers, and check that they can follow every phase."""
        # Those that are chosen by their form may differ in a saved run.
        self._by_form = layers is None and has_factors(sites)
        named = layers if state is None or layers is not None else named_in(state)
        scheduled = scheduled_layers(sites, self.schedule, self.total_steps, named)
        check_held(scheduled, self.optimizer)
        self._layers = {site.path: site.spec.unit_shape for site in scheduled}
        found = check_phases(self.model, phases := self._phases(), sites)
        ahead = [one for one in found if one[0].stop > begun_at(state)]
        check_changes(ahead, self.optimizer, hooks=not may_prepare(self.callbacks.values()))
        if self.schedule.spectra_every is not None:  # it may change any of them
            check_followable([(s, s.form) for s in scheduled if s.form], self.optimizer)
        if named is None and not has_factors(sites):
            warn_of_little(sites, [stand_in(phase.plan) for phase in phases], stacklevel=6)

    @property
    def processes(self) -> Processes:
        """The processes that train the model together, as of the last change."""
        if self._processes is None:
            own = Processes() if self._independent else processes_of(*self.model.modules())
            self._processes = own
        return self._processes

    def _agree(self, choose_layers: Callable[[], None]) -> None:
        """Choose the layers; raise ValueError in all processes if they differ in anything asked."""
        self.processes.attempt("a RankScheduler", choose_layers)
        if self.processes.size > 1:
            phases = [[one.start, request_to_data(one.plan)] for one in self._phases()]
            own = {
                "schedule": schedule_identity(self.schedule),
                "total_steps": self.total_steps,
                "layers": {path: list(shape) for path, shape in self._layers.items()},
                "callbacks": list(self.callbacks),
                "optimizers": [type(one).__name__ for one in self.optimizer],
                "moments": self.moments if isinstance(self.moments, str) else "calibrated",
                "phases": phases,
            }
            self.processes.agree("the rank scheduler", own)

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the scheduled layers."""
        return tuple(self._layers)

    def phases(self) -> list[Phase]:
        """The phases of the whole run, as far as the current readings tell.

        Warns:
            UserWarning: once, if the schedule follows the learning rate, and how often the LR
                scheduler is stepped is not known yet: it was not said (``lr_every``).
        """
        if not self._told_of_rates:
            self._told_of_rates = True
            how = self.forecast, self.schedule, self._readings(), self.total_steps
            if why := unknown_rates(*how):
                warnings.warn(why, UserWarning, stacklevel=2)
        return self._phases()

    def _phases(self) -> list[Phase]:
        return self._phases_of(self.schedule)

    def _phases_of(self, schedule: RankSchedule) -> list[Phase]:
        return timeline(schedule, self._readings(), self.total_steps)

    def step(self) -> list[Change]:
        """Count the step that an optimizer took, and bring the model to the next step's plan.

        A call that follows no optimizer step (a micro-batch of an accumulation, a step that the
        gradient scaler skipped) counts nothing and changes nothing; of several optimizers that have
        stepped since the last call, one step counts. Optimizers without torch's step hooks cannot
        be seen: each call counts.

        Returns:
            The changes that were made.

        Raises:
            RuntimeError: after a change, an optimizer does not step the new parameters, or a
                container still holds old ones. Nothing has been counted then.

        Warns:
            RuntimeWarning: another optimizer takes the steps, it seems.
        """
        if not (steps := self._steps.take()):
            self._steps.idle()
            return []
        forget_replaced(*self.model.modules())
        self._check_last_change()
        self._steps.count()
        changes: list[Change] = []
        for _ in range(steps):
            self.last_step += 1
            self._check_states()
            self._budgets.after_first_step(self.schedule, self._phases_of, self.processes)
            self._budgets.agree(self._layers, self.processes)
            for one in self.callbacks.values():
                one.after_step(self)
            if (wrong := self.forecast.watch(self.last_step)) and self._told_of_rates:
                warnings.warn(f"{wrong}; {WAYS}", RuntimeWarning, stacklevel=2)
            changes += self._advance()
        return changes

    def _check_last_change(self) -> None:
        """One step after a change: raise RuntimeError if something goes on with old parameters."""
        if not self._guard.changed:
            return self._guard.check(self.model, self.optimizer)
        every = nn.ModuleList([self.model, *self.averages.copies(self.model)])
        check = partial(self._guard.check, every, self.optimizer)
        with one_scan():
            self.processes.attempt("the check after a change", check)
            if self._left is not None:
                left, self._left = self._left, None
                left.warn()

    def follow(self, ema: Any) -> None:
        """Have an averaged copy of the model (EMA, SWA) go through every change of form with it.

        The average is kept in the model's own basis, so that its parameters and the model's mean
        the same, and averaging them goes on. With W and A the model's and the average's weight::

            full-rank   A
            low-rank    the model's factors but the last:  up + (A - W) R^+  (for an SVD A down^+)
            adapted     A as the base, the model's adapter

        where ``join(factors) = up R``. Averages of every parameter, frozen ones included, as
        torch's are, go on to the model's weight. A bias that a truncation on batches moves is moved
        by ``(A - A') E[x]``; where BatchNorm is recalibrated, the average gets the model's
        statistics (``torch.optim.swa_utils.update_bn`` finds its own). Model and average change
        all or nothing: a layer whose average is not finite is postponed in both.

        Call it once, before or after the first steps, and again if a state was loaded into the
        model alone. The average's own state is not in :meth:`state_dict`: save it beside
        (``dr.save(ema=)``); in the run that goes on, call this first, then load it.

        Args:
            ema: ``AveragedModel``, a ``copy.deepcopy`` of the model, or any object that holds one
                (or several); in any forms, on any device, in any precision.

        Raises:
            TypeError: no copy of the model is found in it, as in lists of tensors.
            ValueError: it is the model itself, shares its memory, or is sharded.

        Example:
            >>> model = nn.Sequential(nn.Linear(8, 8))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> schedule = dr.schedules.dynamic_rank(rank=2)
            >>> ranks = RankScheduler(model, optimizer, schedule, total_steps=10)
            >>> ema = torch.optim.swa_utils.AveragedModel(model)
            >>> ranks.follow(ema)
            >>> for _ in range(5):
            ...     optimizer.step()
            ...     changes = ranks.step()
            ...     ema.update_parameters(model)
            >>> ema.module[0].form
            FullRank()
        """
        with one_scan():
            self.averages.add(self.model, ema)

    def close(self) -> None:
        """Take every hook off the optimizers, the last callback first; the model stays as it is."""
        with ExitStack() as all_of_them:  # whatever one of them raises
            all_of_them.callback(forget_replaced, *self.model.modules())
            all_of_them.callback(unsign_states, self.model, self.optimizer)
            all_of_them.callback(self._budgets.close)
            all_of_them.callback(self._steps.close)
            if self.gradients is not None:
                all_of_them.callback(self.gradients.watch, ())
            for one in self.callbacks.values():
                all_of_them.callback(one.close)

    def state_dict(self) -> dict[str, Any]:
        """The position in the run and the forms the layers have, as plain data.

        With ``moments="calibrated"``, also the gradients kept for the next change, as tensors; with
        a budget ahead and no ``batches``, also the last training batches.
        """
        plan = None if self._plan is None else dict(self._plan)
        sites = find_sites(self.model, self._sites(), {**self._layers, **(plan or {})})
        last = {path: site.last_factored_form for path, site in sites.items()}
        callbacks = stateful_callbacks(self.callbacks).items()
        return {
            "last_step": self.last_step,
            "uncounted": self._steps.uncounted,
            "total_steps": self.total_steps,
            "seed": self._seed,
            "layers": {path: list(shape) for path, shape in self._layers.items()},
            "scheduled_by": schedule_identity(self.schedule),
            "schedule": dict(self._state),
            "postponed": {path: one.to_data() for path, one in self._postponed.layers.items()},
            "forecast": self.forecast.state_dict(),
            "callbacks": {name: one.state_dict() for name, one in callbacks},
            "decisions": [decision.to_data() for decision in self.decisions],
            "request": None if self._request is None else request_to_data(self._request),
            "plan": None if plan is None else request_to_data(plan),
            "last_factored_forms": {p: form_to_data(form) for p, form in last.items() if form},
            "forms": {p: form_to_data(site.form) for p, site in sites.items() if site.form},
            "gradients": None if self.gradients is None else self.gradients.state_dict(),
            "batches": self._budgets.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, undo: ExitStack | None = None) -> None:
        """Restore a saved position and the forms that the layers had then.

        The states of the model, the optimizer and the rank scheduler may be loaded in any order:
        the first one brings the model to the forms of the saved run. A weight that the constructor
        has changed since it was loaded returns exactly, until the first optimizer step. A weight
        of another form is re-expressed (zero if it is not finite) until the model's state is
        loaded. All or nothing: after an exception everything is as it was.

        Args:
            state: what :meth:`state_dict` returned.
            undo: the caller's stack, which takes the load back unless it is emptied.

        Raises:
            ValueError: it is not the state of such a run: other steps, layers, schedule or
                callbacks; a key is missing or unknown; a value is not what was saved.
        """
        with ExitStack() as own, one_scan():
            stack = own if undo is None else undo
            load = lambda: self._load(state, stack)  # noqa: E731
            self.processes.attempt("loading a rank scheduler", load)
            own.pop_all()

    def _load(self, state: Mapping[str, Any], undo: ExitStack) -> None:
        sites = survey(self.model)
        layers = None if self._by_form else self._layers
        own = self.schedule, self.total_steps, layers, self.callbacks
        shapes = {site.path: site.spec.unit_shape for site in sites if site.form is not None}
        saved = SavedState.of(state, *own, shapes)
        told = {key: state[key] for key in ("last_step", "seed", "layers", "forms", "plan")}
        self.processes.agree("the rank scheduler's state", told)
        for plan in saved.plans():
            differences(self.model, plan, sites)  # each is possible
        if self.gradients is not None:
            undo.callback(_reload, self.gradients, self.gradients.state_dict())
        for part in (self, self.forecast, self._postponed, self._steps):
            restore_on_exit(vars(part), undo)
        restore_forms(self.model, saved.forms, saved.last, self.optimizer, undo)
        self.averages.align(self.model, undo)
        self.last_step, self._plan, self._seed = saved.last_step, saved.plan, saved.seed
        self._request = saved.request
        self._steps.load(saved.uncounted)
        self._forms_loaded = forms_loaded()
        self._layers = {path: tuple(shape) for path, shape in saved.layers.items()}
        self.schedule, self._state = saved.schedule, saved.schedule_state
        self.decisions, self._postponed.layers = saved.decisions, saved.postponed
        self.forecast.load_state_dict(state["forecast"])
        for name, one in saved.callbacks.items():
            load_callback(name, self.callbacks[name], one, undo)
        self._guard.expect()
        self._load_gradients(saved.gradients)
        self._budgets.load_state_dict(saved.batches, undo)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._processes = None
        self._forms_loaded = forms_loaded()
        follow_loads(self.model)
        sign_states(self.model, self.optimizer)
        self._steps.watch(self.optimizer)
        for one in self.callbacks.values():
            one.on_copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> RankScheduler:
        made = memo[id(self)] = object.__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        # Process groups belong to this process; what is left behind is not copied.
        return {**vars(self), "_processes": None, "_left": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        check_picklable(self, ("schedule", "callbacks", "forecast", "averages"))
        return super().__reduce_ex__(protocol)

    def _readings(self) -> Readings:
        one = self.optimizer[0] if len(self.optimizer) == 1 else None
        rate = float(one.param_groups[0]["lr"]) if one else None
        waiting = {path: layer.before for path, layer in self._postponed.layers.items()}
        forms = {**(self._plan or {}), **waiting}
        flops = self._budgets.shares(self._layers)
        return Readings(self._layers, rate, self.forecast.rates, forms, flops=flops)

    def _sites(self) -> list[Site]:
        """Those of the model as it is now, scheduled ones also if they cannot change form."""
        return with_known_forms(survey(self.model), {*self._layers, *(self._plan or {})})

    def _with_spectra(self, readings: Readings, sites: Sequence[Site]) -> Readings:
        """The readings, with the rank metrics of the scheduled layers and the forms they have."""
        own = find_sites(self.model, sites, self._layers)
        values = sys.maxsize if "singular_values" in self.schedule.requires else 0
        # The layers' own forms: before the first plan there are no others.
        forms = {path: site.form for path, site in own.items() if site.form is not None}
        spectra = read_spectra((one for one in own.values() if not one.obstacle), values=values)
        return replace(readings, forms=forms, spectra=spectra)

    def _advance(self, sites: Sequence[Site] | None = None) -> list[Change]:
        """Ask the schedule for a plan, and apply it."""
        clock = Clock(min(self.last_step, self.total_steps - 1), self.total_steps)
        readings, every = self._readings(), self.schedule.spectra_every
        reads = every is not None and self.last_step % max(1, step_of(every, self.total_steps)) == 0
        if reads:
            sites = self._sites() if sites is None else sites
            readings = self._with_spectra(readings, sites)
        self.spectra = readings.spectra
        plan, self._state, decisions = self._ask(clock, readings, reads=reads)
        self.decisions += decisions
        changes = self._apply(plan, sites)
        self._watch_gradients(changed=bool(changes))
        return changes

    def _ask(self, clock: Clock, readings: Readings, *, reads: bool) -> Answer:
        """The answer, if it may differ between processes: of process 0, or the same in all.

        Spectra are alike up to rounding. What a user's function looks at is not known, so its
        answers are compared, at each step.
        """
        own = lambda: ask(self.schedule, self._state, clock, readings)  # noqa: E731
        if self.processes.size == 1:
            return own()
        alike = None
        if users := isinstance(schedule_identity(self.schedule), str):
            alike = _plan_data
        what = f"the plan of step {self.last_step}"
        answer = self.processes.attempt(what, own, alike) if users or reads else own()
        return self.processes.from_first("the schedule's answer", answer) if reads else answer

    def _check_states(self) -> None:
        """Once optimizers have states: raise ValueError if a later change could not move them."""
        inner = [one for optimizer in self.optimizer for one in wrapped(optimizer)]
        if not self._states_checked:
            check_order(self.model, self.optimizer)
        if self._states_checked or not any(one.state for one in inner):
            return
        self._states_checked = True
        if all(type(one).__module__.startswith("torch.optim") for one in inner):  # known by class
            return
        sites = self._sites()
        later = [stand_in(phase.plan) for phase in self._phases() if phase.start > self.last_step]
        ahead = [site for plan in later for site, _ in differences(self.model, plan, sites)]
        if self.schedule.spectra_every is not None:  # it decides as it goes
            ahead = find_sites(self.model, sites, self._layers).values()
        ahead = [site for site in ahead if not site.obstacle]
        check_movable(self.optimizer, self.moments, ahead)

    def _apply(self, request: Request, sites: Sequence[Site] | None) -> list[Change]:
        step, postponed = self.last_step, self._postponed
        loaded = loaded_since(self._forms_loaded, self.model)
        self._forms_loaded = forms_loaded()
        as_it_was = request == self._request and not loaded
        if as_it_was and not postponed.due_at(step):  # the usual step: no traversal
            return []
        self._processes = None  # the model may have been wrapped since
        with one_scan():
            now = {"step": step, "plan": request_to_data(request), "postponed": [*postponed.layers]}
            self.processes.agree("the rank scheduler's step", now)
            sites = self._sites() if sites is None else sites
            waiting = postponed.budgets(step)
            last = self._request, self._plan
            found = self._budgets.resolve(request, *last, waiting, sites, self.processes)
            tried = postponed.due(differences(self.model, found.plan, sites), request, step)
            due = [pair for pair in tried if not pair[0].obstacle]
            statistics = running_statistics(self.model) if self.averages.holders else {}
            left = LeftCopies([place.module for site, _ in due for place in site.places])
            changes, unfit = self._change(due, found)
        self._decide(found, request)
        self._request, self._plan = dict(request), dict(found.plan)
        unmeasured = find_sites(self.model, sites, found.unmeasured)
        tried += [(site, found.unmeasured[path]) for path, site in unmeasured.items()]
        stuck = {s.path: f"layer {s.path!r}: {s.obstacle}" for s, _ in tried if s.obstacle}
        postponed.record(tried, unfit := {**stuck, **unfit, **found.unfit}, step)
        if changes:
            self._guard.expect([site for site, _ in due], changes)
            self._left = left
            if step:  # states may be loaded after the first plan
                left.expect()
        if changes:
            self.processes.attempt("what follows a change", lambda: self._tell(changes))
            self.averages.take_statistics(self.model, statistics)
        if unfit and (step or not found.unmeasured):  # before the first batch a budget waits for it
            warnings.warn(postponed.warning(unfit, step), RuntimeWarning, stacklevel=4)
        return changes

    def _tell(self, changes: list[Change]) -> None:
        for one in self.callbacks.values():
            one.after_change(self, changes)

    def _decide(self, found: Resolved, request: Request) -> None:
        """Record the forms that were found for budgets, and those that replace them."""
        last = {} if self._request is None else self._request
        for path, form in found.plan.items():
            if path in found.found:
                why, readings = f"within {found.found[path]}", {"budget": found.found[path].amount}
            elif isinstance(last.get(path), Within) and request[path] != last[path]:
                why, readings = "after a budget", {}
            else:
                continue
            self.decisions.append(Decision(self.last_step, path, form, why, readings))

    def _change(
        self, due: Sequence[tuple[Site, Form]], found: Resolved
    ) -> tuple[list[Change], dict[str, str]]:
        """Make the changes that can be made; also the reasons why the others cannot, by path."""
        if not due:
            return [], {}
        calibrated = lambda: self._calibrations(due, found)  # noqa: E731
        try:
            known = fit_everywhere("the calibration", calibrated, self.processes)
        except (UnfitWeightError, LinAlgError) as error:  # of a calibration: for truncations only
            held = [pair for pair in due if truncates([pair])] or due
            left = [pair for pair in due if pair not in held]
            changes, unfit = self._change(left, found)
            return changes, unfit | {s.path: f"layer {s.path!r}: {error}" for s, _ in held}
        first = self._plan is None  # of a model that may have been loaded already
        with ExitStack() as undo:
            how: dict[str, Any] = {"seed": self._seed, "keep": first, "undo": undo}
            how["together"] = self.processes
            how["averages"] = partial(self.averages.copies, self.model)
            with self.averages.renamed(self.model, undo):
                made = change_fit_layers(due, self.optimizer, self.moments, known, **how)
            self._recalibrate(made[0], found)
            undo.pop_all()
        return made

    def _calibrations(
        self, due: Sequence[tuple[Site, Form]], found: Resolved
    ) -> dict[str, ActivationStats]:
        """The activation statistics of what is truncated."""
        callbacks = self.callbacks.values()
        given = [c for one in callbacks if (c := one.before_change(self, due)) is not None]
        own = self._budgets.statistics(found, due, self.processes)
        if len(given) > 1:
            raise ValueError(f"{len(given)} callbacks calibrate one change; leave one of them")
        return {**(given[0] if given else {}), **own}

    def _recalibrate(self, changes: Sequence[Change], found: Resolved) -> None:
        """Recalibrate BatchNorm behind layers that were cut on batches."""
        if self.last_step and any(change.path in found.calibration for change in changes):
            try:
                recalibrate_batch_norms(self.model, found.batches, together=self.processes)
            except UnfitWeightError as error:
                warnings.warn(f"step {self.last_step}: {error}", RuntimeWarning, stacklevel=6)

    def _load_gradients(self, saved: dict[str, list[list[Tensor]]] | None) -> None:
        if self.gradients is not None and saved is not None:
            self.gradients.load_state_dict(saved)
        elif saved is not None:
            raise ValueError(
                "the saved run kept gradients for its next change (moments='calibrated'), this one "
                "does not; give the same moments=, or set the state's 'gradients' to None"
            )
        self._watch_gradients()

    def _watch_gradients(self, *, changed: bool = False) -> None:
        """Keep the gradients of the layers that will have another form before long."""
        if self.gradients is None:
            return
        ahead = min(self.last_step + self.gradients.length, self.total_steps - 1)
        clock, readings = Clock(ahead, self.total_steps), self._readings()
        request = self.schedule.update(self._state, clock, readings).plan
        now = {**readings.forms, **{p: one for p, one in (self._request or {}).items()}}
        paths = [path for path, one in request.items() if one != now.get(path, one)]
        with suppress(ValueError):  # it is said once they are to change
            return self.gradients.watch(paths, changed=changed)
        able = {site.path for site in self._sites() if not site.obstacle}
        self.gradients.watch([path for path in paths if path in able], changed=changed)


def _plan_data(answer: Answer) -> Any:
    return request_to_data(answer.plan)


def _reload(gradients: GradientWindow, state: Mapping[str, Any]) -> None:
    """Go on with these gradients, of weights that have their old parameters again."""
    with suppress(ValueError):
        gradients.load_state_dict(state)
