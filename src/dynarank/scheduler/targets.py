"""Which layers of a model a schedule is for."""

from __future__ import annotations

from collections.abc import Sequence

from dynarank.forms import LowRank
from dynarank.schedules.base import Readings, Schedule
from dynarank.schedules.timelines import timeline
from dynarank.surgery.selection import LayerFilter, select
from dynarank.surgery.sites import Site

__all__ = ["scheduled_layers"]


def scheduled_layers(
    sites: Sequence[Site], schedule: Schedule, total_steps: int, layers: LayerFilter = None
) -> list[Site]:
    """Those of a model's sites that a schedule is for: see ``layers`` of :class:`RankScheduler`."""
    if layers is not None or any(site.last_factored_form is not None for site in sites):
        return select(sites, layers)
    able = {s.path: s.spec.unit_shape for s in sites if s.form is not None}
    given: dict[str, set[LowRank]] = {path: set() for path in able}
    for phase in timeline(schedule, Readings(able), total_steps):
        for path, form in phase.plan.items():
            given[path] |= {form} if isinstance(form, LowRank) else set()
    low = set[LowRank]().union(*given.values())
    if not low:
        return select(sites, lambda module, path: path in able)
    cheaper = {f: {s.path for s in select(sites, None, f.rank, f.decomposition)} for f in low}
    paths = {path for path, own in given.items() if all(path in cheaper[f] for f in own or low)}
    return select(sites, lambda module, path: path in paths)
