"""The state of a rank scheduler, read and checked whole before any of it is used."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor

from dynarank.cost.budget import stand_in
from dynarank.form_data import (
    form_from_data,
    form_to_data,
    request_from_data,
    request_to_data,
)
from dynarank.forms import Adapted, Form, FullRank, LowRank, Plan, Request, Within
from dynarank.scheduler.callbacks import Callback, stateful_callbacks
from dynarank.scheduler.postponed import Waiting
from dynarank.schedules.base import Decision, FunctionSchedule, RankSchedule, State
from dynarank.schedules.serialization import schedule_from_data, schedule_to_data

__all__ = ["KEYS", "SavedState", "schedule_identity"]

_T = TypeVar("_T")

KEYS = (
    "last_step",
    "uncounted",
    "total_steps",
    "seed",
    "layers",
    "scheduled_by",
    "schedule",
    "postponed",
    "forecast",
    "callbacks",
    "decisions",
    "request",
    "plan",
    "last_factored_forms",
    "forms",
    "gradients",
    "batches",
)


@dataclass(frozen=True)
class SavedState:
    """What ``RankScheduler.state_dict`` returned, checked against the scheduler that loads it.

    Args:
        last_step: the number of optimizer steps that were done.
        uncounted: the number of those that were done, and not counted yet.
        seed: that of new adapters.
        layers: the scheduled layers, with their shapes.
        schedule: the schedule that goes on: the scheduler's own, or a fitted one that was saved.
        schedule_state: its state.
        postponed: the layers whose change was postponed.
        callbacks: the state of each callback that has one, by name.
        decisions: what the schedule had decided.
        request: the schedule's last answer; None if it had not been asked.
        plan: the forms of that answer, those found for budgets among them.
        last: the form in which each weight last had factors.
        forms: the form of each weight.
        gradients: those kept for the next change, by path; None if none are to be kept.
        batches: the last training batches, kept for the next budget; None if none are to be kept.
    """

    last_step: int
    uncounted: int
    seed: int
    layers: Mapping[str, Sequence[int]]
    schedule: RankSchedule
    schedule_state: State
    postponed: dict[str, Waiting]
    callbacks: dict[str, dict[str, Any]]
    decisions: list[Decision]
    request: dict[str, Form | Within] | None
    plan: dict[str, Form] | None
    last: dict[str, LowRank | Adapted]
    forms: dict[str, Form]
    gradients: dict[str, list[list[Tensor]]] | None
    batches: list[Any] | None

    @classmethod
    def of(
        cls,
        state: Mapping[str, Any],
        schedule: RankSchedule,
        total_steps: int,
        layers: Mapping[str, Sequence[int]] | None,
        callbacks: Mapping[str, Callback],
        shapes: Mapping[str, Sequence[int]],
    ) -> SavedState:
        """Read a state for a scheduler with these arguments, and a model of these shapes.

        ``layers`` is None if nobody has named them: those of the state.

        Raises:
            ValueError: a key is missing or unknown, a value is not what ``state_dict`` returns, or
                it is the state of another run: other steps, layers, callbacks, another schedule.
        """
        state = _of_older_version(state)
        _check_run(state, total_steps, callbacks)
        goes_on = _schedule(state["scheduled_by"], schedule)
        # Which layers get cheaper may differ from one fitted schedule to another.
        if layers is None or goes_on is not schedule:
            layers = {path: shapes.get(path, ()) for path in state["layers"]}
        _check_layers(state["layers"], layers)
        with _reading("schedule", state["schedule"]):
            goes_on.check_state(state["schedule"], layers)
        forms = _each(state, "forms", _resolved_form)
        saved = cls(
            last_step=_count(state, "last_step"),
            uncounted=_uncounted(state),
            seed=_seed(state),
            layers=layers,
            schedule=goes_on,
            schedule_state=state["schedule"],
            postponed=_each(state, "postponed", _waiting),
            callbacks=dict(state["callbacks"]),
            decisions=_decisions(state["decisions"]),
            request=None if state["request"] is None else _each(state, "request", _answer),
            plan=None if state["plan"] is None else _each(state, "plan", _form),
            last=_each(state, "last_factored_forms", _factored_form),
            forms=forms,
            gradients=_gradients(state["gradients"]),
            batches=_batches(state["batches"]),
        )
        _check_answers(saved.request or {}, saved.plan or {})
        _same("forms", forms, [*layers, *(saved.plan or {})], "the layers and the last plan name")
        for key, named in (("postponed", saved.postponed), ("last_factored_forms", saved.last)):
            if unknown := named.keys() - forms.keys():
                raise ValueError(_wrong(key, sorted(unknown), "these layers have no form in it"))
        for path, waiting in saved.postponed.items():
            if waiting.before != forms[path]:
                why = f"the form of {path!r} in 'forms' is {forms[path]}"
                raise ValueError(_wrong("postponed", waiting, why))
        return saved

    def plans(self) -> list[Mapping[str, Form]]:
        """All forms in it, by path, as plans that the model must be able to follow."""
        waiting = self.postponed.items()
        before, after = ({p: getattr(w, k) for p, w in waiting} for k in ("before", "after"))
        return [self.forms, self.last, self.plan or {}, before, stand_in(after)]


def _check_answers(request: Request, plan: Plan) -> None:
    """Raise ValueError unless the plan has what was answered, and a form for each budget."""
    _same("request", request, plan, "the layers of the plan are")
    for path, answer in request.items():
        if not isinstance(answer, Within) and answer != plan[path]:
            why = f"it answered {answer} for {path!r}, and the plan has {plan[path]}"
            raise ValueError(_wrong("request", path, why))


def _of_older_version(state: Any) -> Any:
    """A state of a version without budgets: what the schedule answered was the plan."""
    known = isinstance(state, Mapping) and "plan" in state
    if not known or "request" in state or "batches" in state:
        return state
    made = {"request": state["plan"], "batches": None, "uncounted": 0}
    return {**made, **cast(Mapping[str, Any], state)}


def schedule_identity(schedule: RankSchedule) -> Any:
    """What tells a schedule from others: its data, or else its name."""
    try:
        return schedule_to_data(schedule)
    except ValueError:  # a user's own function or class
        own = schedule.function if isinstance(schedule, FunctionSchedule) else type(schedule)
        return getattr(own, "__name__", type(own).__name__)


def _check_run(
    state: Any,
    total_steps: int,
    callbacks: Mapping[str, Callback],
) -> None:
    """Raise ValueError if it is no state, or that of another run."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of a rank scheduler is a dict, got {state!r}")
    found = cast(Mapping[str, Any], state)
    if "total_steps" in found and not _equal(steps := found["total_steps"], total_steps):
        raise ValueError(
            f"the saved rank schedule is of a run of {steps} steps, this one has {total_steps}; "
            "give the same total_steps"
        )
    _same("keys", found, KEYS, "of a rank scheduler's state are")
    for key in ("layers", "callbacks", "schedule", "forecast"):
        if not isinstance(found[key], Mapping):
            raise ValueError(_wrong(key, found[key], "it is a dict"))
    _check_callbacks(found["callbacks"], callbacks)


def _check_layers(saved: object, layers: Mapping[str, Sequence[int]]) -> None:
    mine = {path: list(shape) for path, shape in layers.items()}
    if not _equal(saved, mine):
        raise ValueError(
            f"the saved run scheduled the layers {saved!r}, this one schedules {mine!r}; give the "
            "same model and layers="
        )


def _check_callbacks(states: Mapping[str, Any], callbacks: Mapping[str, Callback]) -> None:
    own = stateful_callbacks(callbacks)
    if missing := sorted(map(str, states.keys() - own.keys())):
        raise ValueError(
            f"the saved run had the callbacks {', '.join(missing)}, this one has not; give the "
            "same callbacks"
        )
    if new := own.keys() - states.keys():
        raise ValueError(
            f"this run has the callbacks {', '.join(sorted(new))}, the saved one had not; give the "
            "same callbacks, or add callback.state_dict() to the saved state's 'callbacks'"
        )
    if wrong := [one for one in states.values() if not isinstance(one, Mapping)]:
        raise ValueError(_wrong("callbacks", wrong[0], "the state of a callback is a dict"))


def _schedule(saved: Any, own: RankSchedule) -> RankSchedule:
    """The schedule that goes on; a fitted one is part of the state, since fitting may differ."""
    mine = schedule_identity(own)
    if _equal(saved, mine):
        return own
    if own.fitted and isinstance(saved, Mapping):
        with _reading("scheduled_by", saved):
            made = schedule_from_data(cast(Mapping[str, Any], saved))
            if made.fitted and _equal(schedule_to_data(made), saved):
                return made
    raise ValueError(
        f"the saved run followed the schedule {saved!r}, this one follows {mine!r}; give the same "
        "schedule"
    )


def _count(data: Mapping[str, Any], key: str, least: int = 0) -> int:
    value = data[key]
    if type(value) is not int or value < least:
        raise ValueError(_wrong(key, value, f"it is a whole number of at least {least}"))
    return value


def _uncounted(data: Mapping[str, Any]) -> int:
    if (count := _count(data, "uncounted")) > data["total_steps"]:
        raise ValueError(_wrong("uncounted", count, f"the run has {data['total_steps']} steps"))
    return count


def _seed(data: Mapping[str, Any]) -> int:
    if (seed := _count(data, "seed")) >= 2**64:
        raise ValueError(_wrong("seed", seed, "a seed of torch's is below 2**64"))
    return seed


def _each(
    state: Mapping[str, Any], key: str, read: Callable[[Mapping[str, Any]], _T]
) -> dict[str, _T]:
    """A value for each path, read from its data."""
    with _reading(key, state[key]):
        found = cast(Mapping[Any, Mapping[str, Any]], state[key])
        if wrong := [path for path in found if type(path) is not str]:
            raise ValueError(f"a path is a string, got {wrong[0]!r}")
        return {path: read(data) for path, data in found.items()}


def _form(data: Mapping[str, Any]) -> Form:
    form = form_from_data(data)
    typed = isinstance(data.get("recompute", False), bool)
    typed &= isinstance(data.get("decomposition", ""), str)
    if not (typed and _equal(form_to_data(form), data)):
        raise ValueError(f"{dict(data)!r} is not the data of a form")
    return form


def _answer(data: Mapping[str, Any]) -> Form | Within:
    if "form" in data:
        return _form(data)
    found = request_from_data({"": data})
    if not _equal(request_to_data(found), {"": data}):
        raise ValueError(f"{dict(data)!r} is not the data of a budget")
    return found[""]


def _resolved_form(data: Mapping[str, Any]) -> Form:
    form = _form(data)
    if not isinstance(form, FullRank):
        operator.index(cast(Any, form.rank))  # the rank of a layer's own form is a number
    return form


def _factored_form(data: Mapping[str, Any]) -> LowRank | Adapted:
    form = _resolved_form(data)
    if isinstance(form, FullRank):
        raise ValueError("a full-rank weight has no factors")
    return form


def _waiting(data: Mapping[str, Any]) -> Waiting:
    _resolved_form(data["before"])
    (_resolved_form if "form" in data["after"] else _answer)(data["after"])
    _count(data, "patience", 1)
    _count(data, "retry_at")
    return Waiting.from_data(data)


def _decisions(states: Any) -> list[Decision]:
    with _reading("decisions", states):
        made = [Decision.from_data(data) for data in states]
        if not isinstance(states, list):
            raise ValueError("they are a list")
        for data, one in zip(states, made, strict=True):
            _count(data, "step")
            _form(data["form"])
            texts, numbers = (one.path, one.reason), one.readings.values()
            typed = all(type(text) is str for text in texts) and all(map(_number, numbers))
            if not (typed and _equal(one.to_data(), data)):
                raise ValueError(f"{dict(data)!r} is not the data of a decision")
        return made


def _gradients(found: Any) -> dict[str, list[list[Tensor]]] | None:
    """The kept gradients: for each path a list of samples, each of a tensor for each parameter."""
    if found is None:
        return None
    with _reading("gradients", found):
        samples = [sample for one in found.values() for sample in one]
        if not all(isinstance(g, Tensor) for sample in samples for g in sample):
            raise ValueError("they are tensors")
        if wrong := [path for path in found if type(path) is not str]:
            raise ValueError(f"a path is a string, got {wrong[0]!r}")
        return {path: [list(sample) for sample in one] for path, one in found.items()}


def _batches(found: Any) -> list[Any] | None:
    if found is not None and not isinstance(found, list):
        raise ValueError(_wrong("batches", found, "they are a list"))
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def _reading(key: str, value: object) -> Generator[None]:
    """Name the key and its value in the error of anything that cannot be read."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(_wrong(key, value, f"{type(error).__name__}: {error}")) from error


def _same(key: str, found: Iterable[str], wanted: Iterable[str], rule: str) -> None:
    found, wanted = set(found), set(wanted)
    if wrong := (found ^ wanted):
        names = ", ".join(sorted(map(str, wanted)))
        raise ValueError(
            _wrong(key, sorted(map(str, wrong)), f"missing or unknown; {rule} {names}")
        )


def _wrong(key: str, value: object, why: str) -> str:
    return f"the saved rank scheduler's {key!r} cannot be loaded: {value!r}: {why}"


def _equal(one: Any, other: Any) -> bool:
    """Whether plain data is the same, numbers by type too: 1 is a step and 1.0 a share."""
    try:
        return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    except (TypeError, ValueError):
        return False
