"""Budgets in place of forms: measured once, at the transition, and kept until the answer changes.

At a transition the model is calibrated on a few batches, ranks are allocated within the budget, and
the layers are cut, in one transaction. What was found stands until the schedule gives these layers
another answer. With batches of the user's, cuts to a rank of the schedule's are calibrated too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from dynarank.allocation.within_budget import plan_within
from dynarank.cost.budget import Room, shared_budgets, stand_in, uniform_plan
from dynarank.cost.flops import ModelUse, trace, weights_only
from dynarank.decompositions import LinAlgError, UnfitWeightError
from dynarank.distributed.processes import Processes
from dynarank.forms import BudgetKind, Form, Plan, Request, Within
from dynarank.monitors.calibration import Calibration
from dynarank.scheduler.last_batches import LastBatches
from dynarank.scheduler.pooled import calibrate_together
from dynarank.schedules.base import RankSchedule
from dynarank.schedules.timelines import Phase, from_step
from dynarank.schedules.total_budget import met
from dynarank.surgery.shared_edits import fit_everywhere
from dynarank.surgery.sites import Site
from dynarank.surgery.transaction import truncates

__all__ = ["Batches", "Budgets", "Resolved"]

Batches: TypeAlias = Callable[[], Iterable[Any]]


@dataclass
class Resolved:
    """A schedule's answer in forms.

    Args:
        plan: the form of each layer.
        found: the layers whose form has just been found for a budget, and the budget.
        calibration: the activation statistics of what is to be cut.
        batches: those that it was measured on; empty if nothing was.
        unmeasured: the layers whose budget could not be measured, and the budget.
        unfit: the reasons, by path.
    """

    plan: dict[str, Form] = field(default_factory=dict[str, Form])
    found: dict[str, Within] = field(default_factory=dict[str, Within])
    calibration: Calibration = field(default_factory=lambda: Calibration({}))
    batches: list[Any] = field(default_factory=list[Any])
    unmeasured: dict[str, Within] = field(default_factory=dict[str, Within])
    unfit: dict[str, str] = field(default_factory=dict[str, str])


class Budgets:
    """Finds the forms for the budgets in a schedule's answers.

    Args:
        model: the model.
        batches: a function that returns the batches to measure on; None: the last training batches.
    """

    def __init__(self, model: nn.Module, batches: Batches | None) -> None:
        if batches is not None and not callable(batches):
            raise ValueError(
                "batches is a function that returns batches, called at each cut, got "
                f"{batches!r}; give lambda: batches"
            )
        self._model, self._given = model, batches
        self._seen = LastBatches(model)
        self._use: dict[BudgetKind, ModelUse] = {}
        self._shares: tuple[float, float] | None = None
        self._unchecked = False  # until the first batch has been seen
        self._agreed = False

    def shares(self, paths: Collection[str]) -> tuple[float, float] | None:
        """The FLOPs of the scheduled layers and of all else, see ``Readings.flops``."""
        if self._shares is None and "flops" in self._use:
            self._shares = self._use["flops"].shares(paths)
        return self._shares

    def expect(
        self, schedule: RankSchedule, phases: Callable[[RankSchedule], Iterable[Phase]]
    ) -> None:
        """Check the budgets of the phases to come, as far as that is possible by now.

        Args:
            schedule: the schedule.
            phases: the function that tells its phases, which may depend on the FLOPs of a batch.

        Raises:
            ValueError: the smallest ranks cost more than a budget allows, or there are two budgets
                of the model in one plan.
        """
        known = self._given is not None or bool(self._seen())
        ahead = met(schedule, lambda one: self._checked(partial(phases, one), flops=known))
        if self._given is None:
            self._seen.watch(bool(ahead))
        self._unchecked = not known and bool(ahead)

    def _checked(self, phases: Callable[[], Iterable[Phase]], *, flops: bool) -> list[Phase]:
        """The phases with budgets, which can be met as far as that is known."""
        ahead = [phase for phase in phases() if any(_budgets_of(phase.plan))]
        if flops and any(one.kind == "flops" for p in ahead for one in _budgets_of(p.plan)):
            self._cost("flops")
            ahead = [phase for phase in phases() if any(_budgets_of(phase.plan))]
        for phase in ahead:
            with from_step(phase):
                self._check(phase.plan, flops=flops)
        return ahead

    def _check(self, request: Request, *, flops: bool) -> None:
        for budget, paths in shared_budgets(request).items():
            if flops or budget.kind != "flops":
                use = self._cost(budget.kind)
                Room.of(use, budget, paths, stand_in(request)).check()

    def after_first_step(
        self,
        schedule: RankSchedule,
        phases: Callable[[RankSchedule], Iterable[Phase]],
        together: Processes,
    ) -> None:
        """Check FLOPs budgets on the first training batch, if no others were given.

        Raises:
            ValueError: as :meth:`expect`; or the model's forward pass was not seen.
        """
        if not self._unchecked:
            return
        self._unchecked = False
        together.attempt("a budget", lambda: self._check_first(schedule, phases))

    def _check_first(
        self, schedule: RankSchedule, phases: Callable[[RankSchedule], Iterable[Phase]]
    ) -> None:
        if not self._seen():
            raise ValueError(
                "the schedule has budgets, to be measured on training batches, but the forward "
                f"pass of the {type(self._model).__name__} was not seen in the first step (it is "
                "compiled, or called in parts); give RankScheduler(..., batches=lambda: batches)"
            )
        self.expect(schedule, phases)

    def agree(self, paths: Collection[str], together: Processes) -> None:
        """Take the FLOPs that process 0 has counted: batches may differ in length."""
        if not self._agreed and self.shares(paths) is not None:
            self._agreed = True
            self._shares = together.from_first("the FLOPs of the layers", self._shares)

    def statistics(
        self, made: Resolved, due: Sequence[tuple[Site, Form]], together: Processes
    ) -> Calibration:
        """The activation statistics of what is cut to budgets, and of all cuts on given batches.

        Raises:
            UnfitWeightError: outputs that are not finite.
        """
        fixed = {s.path for s, form in due if s.path not in made.found and truncates([(s, form)])}
        if fixed and self._given is not None:
            made.batches = made.batches or list(self._given())
            how = made.batches, _at(fixed), together
            made.calibration.update(calibrate_together(self._model, *how))
        return made.calibration

    def close(self) -> None:
        """Take the hook off the model."""
        self._seen.watch(False)

    def state_dict(self) -> list[Any] | None:
        """The last training batches, if they are kept."""
        return self._seen.state_dict()

    def load_state_dict(self, batches: list[Any] | None, undo: ExitStack) -> None:
        """Go on with these batches, unless others are given."""
        undo.callback(self._seen.load_state_dict, self._seen.state_dict())
        if self._given is None and batches is not None:  # None: saved after it was closed
            self._seen.load_state_dict(batches)

    def resolve(
        self,
        request: Request,
        last: Request | None,
        plan: Plan | None,
        waiting: Mapping[str, bool],
        sites: Sequence[Site],
        together: Processes,
    ) -> Resolved:
        """The forms of an answer: budgets that were asked before keep what was found for them.

        Args:
            request: the schedule's answer.
            last: its last answer; None: there was none.
            plan: the forms that were found for the last answer.
            waiting: layers whose budget could not be measured, and whether that is tried again now.
            sites: a survey of the model.
            together: the processes that ask for this together.
        """
        made = Resolved({p: one for p, one in request.items() if not isinstance(one, Within)})
        before = shared_budgets(last or {})
        now = {site.path: site.form for site in sites if site.form is not None}
        new: list[tuple[Within, tuple[str, ...]]] = []
        for budget, paths in shared_budgets(request).items():
            if plan is None or set(before.get(budget, ())) != set(paths):
                new.append((budget, paths))
            elif not set(paths) & set(waiting):
                made.plan |= {path: plan[path] for path in paths}
            elif any(waiting.get(path) for path in paths):
                new.append((budget, paths))
            else:
                made.plan |= {path: now[path] for path in paths}
        if new and self._given is None:  # counted on a batch that a resumed run has too
            self._use.clear()
        for budget, paths in sorted(new, key=lambda one: one[0].of):  # of="layers" first
            stuck = {site.path: site.obstacle for site in sites if site.obstacle}
            self._measure(made, budget, paths, {**now, **made.plan}, together, stuck)
        return made

    def _measure(
        self,
        made: Resolved,
        budget: Within,
        paths: tuple[str, ...],
        planned: Plan,
        together: Processes,
        stuck: Mapping[str, str],
    ) -> None:
        """Add what is found for one budget: in several processes, what process 0 finds."""

        def find() -> Plan:
            if waits := [f"its layer {path!r}: {stuck[path]}" for path in paths if path in stuck]:
                raise UnfitWeightError("; ".join(waits))
            return self._find(made, budget, paths, planned, together)

        try:
            forms = together.from_first("the ranks", fit_everywhere("a budget", find, together))
        except (UnfitWeightError, LinAlgError) as error:
            made.unmeasured |= dict.fromkeys(paths, budget)
            made.unfit |= {path: f"layer {path!r}, {budget}: {error}" for path in paths}
            made.plan |= {path: planned[path] for path in paths}
        else:
            made.plan |= forms
            made.found |= dict.fromkeys(paths, budget)

    def _find(
        self,
        made: Resolved,
        budget: Within,
        paths: tuple[str, ...],
        planned: Plan,
        together: Processes,
    ) -> Plan:
        made.batches = made.batches or self._batches(budget)
        use, layers = self._cost(budget.kind), _at(paths)
        if made.batches:
            found = calibrate_together(self._model, made.batches, layers, together)
            made.calibration.update(found)
        if budget.ranks == "uniform":
            return uniform_plan(Room.of(use, budget, paths, planned))
        return plan_within(
            self._model,
            flops=budget.flops,
            params=budget.params,
            bytes=budget.bytes,
            of=budget.of,
            calibration=made.calibration,
            multiple_of=budget.multiple_of,
            layers=layers,
            decomposition=budget.decomposition,
            planned={path: form for path, form in planned.items() if path not in paths},
            use=use,
        )

    def _batches(self, budget: Within) -> list[Any]:
        found = list((self._given or self._seen)())
        if not found and self._given is not None:
            raise ValueError("batches() returned no batch to measure a budget on")
        if not found and (budget.ranks == "energy" or budget.kind == "flops"):
            self._seen.watch(True)
            raise UnfitWeightError("there has been no training batch to measure it on")
        return found

    def _cost(self, kind: BudgetKind) -> ModelUse:
        """The costs of the model's weights; FLOPs are those of the first batch."""
        if kind not in self._use:
            batches = iter((self._given or self._seen)()) if kind == "flops" else None
            self._use[kind] = (
                weights_only(self._model) if batches is None else trace(self._model, next(batches))
            )
        return self._use[kind]


def _budgets_of(request: Request) -> Iterator[Within]:
    return (one for one in request.values() if isinstance(one, Within))


def _at(paths: Iterable[str]) -> Callable[[nn.Module, str], bool]:
    """A filter of the layers at these paths."""
    chosen = frozenset(paths)
    return lambda module, path: path in chosen
