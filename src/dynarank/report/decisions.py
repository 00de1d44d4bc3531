"""The table of a schedule's decisions, with their reasons and readings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dynarank.records import DecisionRecord, Run
from dynarank.report.formats import number, plural
from dynarank.report.markup import Html, details, element, table

__all__ = ["decisions_table"]

MOST_ROWS = 80


def decisions_table(runs: Sequence[Run]) -> Html:
    """List the decisions of each step by form and reason: which layers, and their readings.

    Layers that get the same form for the same reason at the same step share a row.
    """
    columns = ("schedule", "epoch", "decision", "reason", "readings")
    rows = [row for run in runs for row in _rows(run)]
    if not rows:
        return Html("")
    left = len(rows) - MOST_ROWS
    more = element("p", f"{plural(left, 'row')} more in records.jsonl.") if left > 0 else Html("")
    return Html(table(columns, rows[:MOST_ROWS], text=range(len(columns))) + more)


def _rows(run: Run) -> Iterator[Sequence[str]]:
    grouped: dict[tuple[int, str, str], list[DecisionRecord]] = {}
    for decision in run.all(DecisionRecord):
        key = (decision.step, str(decision.form.get("form", "unknown")), decision.reason)
        grouped.setdefault(key, []).append(decision)
    for (_, form, reason), decisions in grouped.items():
        first = decisions[0]
        at = f"{number(first.epoch)}"
        if len(decisions) == 1:
            decided = f"{first.path} → {_form_text(first)}"
            yield run.header.schedule, at, decided, _wrapped(reason), _wrapped(_readings(first))
            continue
        listed = [element("li", f"{d.path} → {_form_text(d)}: {_readings(d)}") for d in decisions]
        shown = details(
            f"{plural(len(decisions), 'layer')} → {form}", element("ul", *listed, class_="paths")
        )
        yield run.header.schedule, at, shown, _wrapped(reason), _wrapped("per layer, on the left")


def _form_text(decision: DecisionRecord) -> str:
    rank = decision.form.get("rank")
    return f"{decision.form.get('form', 'unknown')}{'' if rank is None else f', rank {rank}'}"


def _readings(decision: DecisionRecord) -> str:
    read = decision.readings.items()
    return ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in read)


def _wrapped(text: str) -> Html:
    """A cell whose text may wrap; other cells do not."""
    return element("span", text, class_="wrapped")
