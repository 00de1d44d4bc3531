"""The layers that a schedule applies to, and whether they can follow it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from dynarank.forms import LowRank
from dynarank.scheduler.budgets import stand_in
from dynarank.schedules.base import Readings, Schedule
from dynarank.schedules.timelines import Phase, timeline
from dynarank.surgery.selection import LayerFilter, candidates, has_factors, select
from dynarank.surgery.sites import Site
from dynarank.surgery.transaction import differences

__all__ = ["check_phases", "named_in", "scheduled_layers"]


def check_phases(model: nn.Module, phases: Iterable[Phase], sites: Sequence[Site]) -> None:
    """Raise ValueError for a phase whose plan the model, with these sites, cannot follow."""
    for phase in phases:
        try:
            differences(model, stand_in(phase.plan), sites)
        except ValueError as error:
            raise ValueError(f"from step {phase.start}, {error}") from None


def named_in(state: object) -> LayerFilter:
    """The layers of a rank scheduler's state; None if it is none, which its checks will tell."""
    found = state.get("layers") if isinstance(state, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    return lambda module, path: path in found


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
