"""Before a run: which layers a schedule is for, and whether its plans are possible."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dynarank.forms import FullRank, LowRank
from dynarank.schedules.base import Readings, Schedule
from dynarank.schedules.timelines import Phase, timeline
from dynarank.surgery.selection import LayerFilter, find_sites, select
from dynarank.surgery.sites import Site, survey

__all__ = ["check_phases", "scheduled_layers"]


def scheduled_layers(
    model: nn.Module, schedule: Schedule, total_steps: int, layers: LayerFilter = None
) -> list[Site]:
    """The layers a schedule is for: see ``layers`` of :class:`RankScheduler`."""
    sites = survey(model)
    if layers is not None or any(site.last_factored_form is not None for site in sites):
        return select(sites, layers)
    able = {s.path: s.spec.unit_shape for s in sites if s.form is not None}
    given: dict[str, set[LowRank]] = {path: set() for path in able}
    for phase in timeline(schedule, Readings(able), total_steps):
        for path, site in find_sites(model, sites, phase.plan).items():
            form = phase.plan[path]
            given[site.path] |= {form} if isinstance(form, LowRank) else set()
    low = set[LowRank]().union(*given.values())
    if not low:
        return select(sites, lambda module, path: path in able)
    cheaper = {f: {s.path for s in select(sites, None, f.rank, f.decomposition)} for f in low}
    paths = {path for path, own in given.items() if all(path in cheaper[f] for f in own or low)}
    return select(sites, lambda module, path: path in paths)


def check_phases(phases: Iterable[Phase], model: nn.Module) -> None:
    """Raise for a plan that no weights could make possible.

    Raises:
        ValueError: an unknown layer or decomposition, a rank above the layer's limit.
    """
    sites = survey(model)
    for phase in phases:
        for path, site in find_sites(model, sites, phase.plan).items():
            form = phase.plan[path]
            if isinstance(form, FullRank):
                continue
            try:
                site.spec.resolve(form)
            except ValueError as error:
                raise ValueError(f"from step {phase.start}, layer {path!r}: {error}") from None
