"""The answers as tables: who is on the front, whether full rank is met, what inflation brought."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.training.harness.comparison import PAPER
from benchmarks.training.harness.kinds import OTHER, kind
from benchmarks.training.harness.summary import ALL_FLOPS, CHEAP, FULL, Summaries
from benchmarks.training.harness.tables import around, at_end, beside, markdown

COSTS = {ALL_FLOPS: "FLOPs", "memory_peak": "memory", "cpu_seconds": "CPU seconds"}


def fronts(problems: Sequence[Summaries]) -> str:
    """Which kinds of arms stand on the front of each problem against each cost."""
    head = ("problem", *(f"against {words}" for words in COSTS.values()))
    rows = [
        (found.experiment.short, *(_front(found, cost) for cost in COSTS)) for found in problems
    ]
    return markdown(head, rows, words=len(head))


def _front(found: Summaries, cost: str) -> str:
    """Kinds, related methods by name, in the order of the arms."""
    front = found.front(cost)
    named = {arm: kind(arm) for arm in found.arms if arm in front}
    return "; ".join(dict.fromkeys(arm if of == OTHER else of for arm, of in named.items()))


def met(problems: Sequence[Summaries]) -> str:
    """Of the arms that are cheap, the best, the best that changes in training; and the paper's."""
    head = (
        "problem", "n", f"best at {CHEAP:g} or less", "minus full rank",
        "best schedule of these", "minus full rank", "the paper's order", "minus full rank",
    )  # fmt: skip
    return markdown(head, [_met(found) for found in problems])


def _met(found: Summaries) -> tuple[str, ...]:
    cheap = [arm for arm in found.arms if found.cheap(arm)]
    chosen = (
        found.best(cheap),
        found.best(arm for arm in cheap if found.changes(arm)),
        PAPER if PAPER in found.arms else None,
    )
    cells = [cell for arm in chosen for cell in _behind(found, arm)]
    return (found.experiment.short, str(found.arms[FULL].n), *cells)


def _behind(found: Summaries, arm: str | None) -> Iterator[str]:
    """An arm, but the paper's, with all FLOPs; the difference from full rank, and if it is met."""
    share = "" if arm is None else f"{found.share(arm, ALL_FLOPS):.2f}x"
    yield share if arm in (None, PAPER) else f"{arm} ({share})"
    words = ", met" if arm is not None and found.meets_full(arm) else ""
    yield "" if arm is None else f"{beside(found, arm, FULL)}{words}"


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
