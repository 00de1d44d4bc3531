"""The answers as tables: who is on the front, whether full rank is met, what inflation brought."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.training.harness.comparison import PAPER
from benchmarks.training.harness.kinds import OTHER, kind
from benchmarks.training.harness.statistics import Difference
from benchmarks.training.harness.summary import ALL_FLOPS, CHEAP, FULL, SECONDS, Summaries
from benchmarks.training.harness.tables import around, at_end, beside, digits, markdown, short

COSTS = {ALL_FLOPS: "FLOPs", "memory_peak": "memory", SECONDS: "CPU seconds"}


def fronts(problems: Sequence[Summaries]) -> str:
    """Which kinds of arms stand on the front of each problem against each cost."""
    head = ("problem", *(f"against {words}" for words in COSTS.values()))
    rows = [
        (found.experiment.short, *(_front(found, cost) for cost in COSTS)) for found in problems
    ]
    return markdown(head, rows, words=len(head))


def _front(found: Summaries, cost: str) -> str:
    """Kinds, related methods by name, in the order of the arms."""
    if not found.all_know(cost):
        return "not timed"
    front = found.front(cost)
    named = {arm: kind(arm) for arm in found.arms if arm in front}
    return "; ".join(dict.fromkeys(arm if of == OTHER else of for arm, of in named.items()))


def met(problems: Sequence[Summaries]) -> str:
    """Of the arms that are cheap, the best, the best that changes in training; and the paper's."""
    head = (
        "problem", "n", f"best at {CHEAP:g} or less", "picked, minus full rank",
        "best schedule of these", "picked, minus full rank",
        "the paper's order", "minus full rank",
    )  # fmt: skip
    return markdown(head, [_met(found) for found in problems])


def _met(found: Summaries) -> tuple[str, ...]:
    cheap = [arm for arm in found.arms if found.cheap(arm)]
    schedules = [arm for arm in cheap if found.changes(arm)]
    cells = (*_best(found, cheap), *_best(found, schedules), *_paper(found))
    return (found.experiment.short, str(found.arms[FULL].n), *cells)


def _best(found: Summaries, arms: Sequence[str]) -> tuple[str, str]:
    """The best of some arms, with all its FLOPs; and how what is picked differs from full rank."""
    best = found.best(arms)
    if best is None:
        return "", ""
    share = found.share(best, ALL_FLOPS)
    return f"{best} ({share:.2f}x)", _words(found, found.beyond_full(found.picked(arms)))


def _paper(found: Summaries) -> tuple[str, str]:
    if PAPER not in found.arms:
        return "", ""
    difference = found.difference(PAPER, FULL)
    return f"{found.share(PAPER, ALL_FLOPS):.2f}x", _words(found, difference)


def _words(found: Summaries, difference: Difference | None) -> str:
    """A difference, and whether full rank is met."""
    met = difference is not None and difference.met
    return f"{short(difference, digits(found))}{', met' if met else ''}"


def inflation(problems: Sequence[Summaries]) -> str:
    """The rank that inflation restored, and what the paper's order won over its FLOPs."""
    head = (
        "problem", "inflated", "before deflation", "end", "full rank's end", "FLOPs",
        "minus fixed low rank", "minus full rank",
    )  # fmt: skip
    return markdown(head, [_inflation(found) for found in problems if PAPER in found.arms])


def _inflation(found: Summaries) -> tuple[str, ...]:
    one, full = found.arms[PAPER], found.arms[FULL]
    inflated, before, _ = around(one)
    ranks = (inflated, before, at_end(one), at_end(full))
    return (
        found.experiment.short, *(f"{rank:.2f}" for rank in ranks),
        f"{found.share(PAPER, ALL_FLOPS):.2f}",
        beside(found, PAPER, found.counterpart(PAPER)), beside(found, PAPER, FULL),
    )  # fmt: skip
