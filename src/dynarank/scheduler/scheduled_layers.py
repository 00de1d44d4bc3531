"""The layers that a schedule applies to, and whether they can follow it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from dynarank.cost.budget import stand_in
from dynarank.forms import Form, LowRank, same_weight
from dynarank.schedules.base import Readings, Schedule
from dynarank.schedules.budget_error import BudgetError
from dynarank.schedules.timelines import Phase, from_step, timeline
from dynarank.surgery.edit import check_replaceable
from dynarank.surgery.optimizer_state import check_followable
from dynarank.surgery.selection import LayerFilter, candidates, has_factors, select
from dynarank.surgery.sites import Site
from dynarank.surgery.transaction import differences

__all__ = [
    "begun_at",
    "check_changes",
    "check_phases",
    "named_in",
    "scheduled_layers",
    "with_known_forms",
]

Wanted = Sequence[tuple[Site, Form]]


def check_phases(
    model: nn.Module, phases: Iterable[Phase], sites: Sequence[Site]
) -> list[tuple[Phase, Wanted]]:
    """What each phase changes of a model with these sites.

    Raises:
        ValueError: the model cannot follow a phase's plan.
    """
    found: list[tuple[Phase, Wanted]] = []
    for phase in phases:
        with from_step(phase):
            found.append((phase, differences(model, stand_in(phase.plan), sites)))
    return found


def check_changes(
    ahead: Iterable[tuple[Phase, Wanted]], optimizers: Sequence[Any], *, hooks: bool
) -> None:
    """Raise ValueError for a change with which something would be lost.

    Args:
        ahead: from :func:`check_phases`.
        optimizers: those that hold the weights, with lists of their own that must follow.
        hooks: whether gradient hooks count: a callback may take them off before.
    """
    for phase, wanted in ahead:
        replaced = [(s, after) for s, after in wanted if s.form and not same_weight(s.form, after)]
        with from_step(phase):
            check_followable(replaced, optimizers)
            for site, _ in replaced if hooks else ():
                check_replaceable(site.path, site.parameters())


def with_known_forms(sites: Iterable[Site], paths: Container[str]) -> list[Site]:
    """The sites; those at these paths also with a form if they cannot change it, by an obstacle."""
    return [
        replace(site, form=site.present_form) if any(p in paths for p in site.paths) else site
        for site in sites
    ]


def named_in(state: object) -> LayerFilter:
    """The layers of a rank scheduler's state; None if it is none, which its checks will tell."""
    found = state.get("layers") if isinstance(state, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    return lambda module, path: path in found


def begun_at(state: object) -> int:
    """The step at which a rank scheduler's state goes on; 0 if it is none."""
    found = state.get("last_step") if isinstance(state, Mapping) else None
    return found if isinstance(found, int) else 0


def scheduled_layers(
    sites: Sequence[Site], schedule: Schedule, total_steps: int, layers: LayerFilter = None
) -> list[Site]:
    """The sites that a schedule applies to: see ``layers`` of :class:`RankScheduler`."""
    if layers is not None or has_factors(sites):
        return select(sites, layers)
    able = {s.path: s.spec.unit_shape for s in sites if s.form is not None}
    given: dict[str, set[LowRank]] = {path: set() for path in able}
    phases: list[Phase] = []
    with suppress(BudgetError):  # told as soon as a batch says what can be met
        phases = timeline(schedule, Readings(able), total_steps)
    for phase in phases:
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
