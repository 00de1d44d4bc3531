"""The form and rank of each layer over time, reconstructed from a run's records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynarank.records import ChangeRecord, PhaseRecord, Run, SpectrumRecord
from dynarank.report.transition_points import last_epoch

__all__ = ["FormSpan", "layer_forms", "layer_names"]


@dataclass(frozen=True)
class FormSpan:
    """A span of training during which one layer kept its form.

    Args:
        start: its first epoch.
        end: its last.
        form: ``full-rank``, ``low-rank`` or ``adapted``.
        rank: of the factors; None where it is full-rank or was not recorded.
        share: the rank as a share of the layer's full rank; 1 where full-rank, None if unknown.
    """

    start: float
    end: float
    form: str
    rank: int | None = None
    share: float | None = None


def layer_names(run: Run) -> list[str]:
    """The layers that are monitored or change form, in the order of the network."""
    names = dict.fromkeys(name for r in run.all(SpectrumRecord) for name in r.layers)
    return list(names | dict.fromkeys(change.path for change in run.all(ChangeRecord)))


def layer_forms(run: Run) -> dict[str, list[FormSpan]]:
    """Each layer's forms over time, in the order of the network.

    Records list changes, but not the form of a layer that never changes. It is assumed to be the
    one that most layers have at the start, ignoring full-rank layers if there are others.
    """
    changes: dict[str, list[ChangeRecord]] = {}
    for change in run.all(ChangeRecord):
        changes.setdefault(change.path, []).append(change)
    start, end = _first_form(run), last_epoch(run)
    known = {name: layer for r in run.all(SpectrumRecord) for name, layer in r.layers.items()}
    found: dict[str, list[FormSpan]] = {}
    for name in layer_names(run):
        layer, here = known.get(name), changes.get(name, [])
        first = here[0].before if here else start
        if layer is not None and not here and start["form"] != "full-rank":
            first = {**start, "rank": layer.rank}
        forms = [(0.0, first), *((change.epoch, change.after) for change in here)]
        found[name] = _spans(forms, end, layer.full_rank if layer else None)
    return found


def _spans(
    forms: Sequence[tuple[float, Mapping[str, Any]]], end: float, full: int | None
) -> list[FormSpan]:
    """One span per form; the same form again (a restart) extends the span before it."""
    found: list[FormSpan] = []
    for (start, data), stop in zip(forms, [*(at for at, _ in forms[1:]), end], strict=True):
        form, rank = str(data.get("form", "unknown")), _rank(data)
        if found and (found[-1].form, found[-1].rank) == (form, rank):
            start = found.pop().start
        found.append(FormSpan(start, stop, form, rank, _share(form, rank, full)))
    return [span for span in found if span.end > span.start]


def _rank(data: Mapping[str, Any]) -> int | None:
    rank = data.get("rank")
    return rank if isinstance(rank, int) else None


def _share(form: str, rank: int | None, full: int | None) -> float | None:
    if form == "full-rank":
        return 1.0
    return min(rank / full, 1.0) if rank is not None and full else None


def _first_form(run: Run) -> dict[str, Any]:
    phase = next((phase for phase in run.all(PhaseRecord) if phase.forms), None)
    if phase is None:
        return {"form": "unknown"}
    reduced = {form: count for form, count in phase.forms.items() if form != "full-rank" and count}
    return {"form": max(reduced or phase.forms, key=lambda form: phase.forms[form])}
