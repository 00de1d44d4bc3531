"""The tables and sentences of docs/evidence.md, from the records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from benchmarks.training.harness.record import Run
from benchmarks.training.harness.statistics import Difference, corrected
from benchmarks.training.harness.summary import (
    ALL_FLOPS,
    CHEAP,
    CHEAP_END,
    FULL,
    SECONDS,
    Summaries,
    Summary,
)

HEAD = (
    "arm", "n", "rate", "FLOPs", "further", "last", "parameters", "memory", "CPU s", "result",
    "minus full rank", "minus fixed low rank",
)  # fmt: skip


def table(found: Summaries) -> str:
    """The table of an experiment; arms on the front of quality against FLOPs are bold."""
    front = found.front()
    rows = [_row(one, found, one.arm in front) for one in found.arms.values()]
    return markdown(HEAD, rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown; all columns but the first few are figures."""
    rule = [*["---"] * words, *["--:"] * (len(head) - words)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def _row(one: Summary, found: Summaries, bold: bool) -> tuple[str, ...]:
    counterpart = found.counterpart(one.arm)
    return (
        f"**{one.arm}**" if bold else one.arm,
        _n(one, found),
        f"{one.runs[0]['setting']['rate']:g}{_marks(one, found)}",
        f"{one.mean('flops'):.3f}",
        "" if (further := found.further(one.arm)) is None else f"{further:.3f}",
        f"{one.mean('end_flops'):.3f}",
        *(_share(one.arm, found, key) for key in ("parameters_mean", "memory_peak", SECONDS)),
        one.text(digits(found)),
        "" if one.arm == FULL else text(found.difference(one.arm, FULL), digits(found)),
        "" if counterpart is None else text(found.difference(one.arm, counterpart), digits(found)),
    )


def _n(one: Summary, found: Summaries) -> str:
    """How many runs; of how many, if some diverged."""
    lost = sum(run["arm"] == one.arm for run in found.diverged)
    return f"{one.n} of {one.n + lost}" if lost else str(one.n)


def _marks(one: Summary, found: Summaries) -> str:
    """What was chosen: n, the norm of the draw; p, decay of the product; e, a rate at an end."""
    setting = one.runs[0]["setting"]
    chosen = {
        "n": setting["start"] == "norm",
        "p": setting["decay"] == "product",
        "e": one.arm in found.at_an_end,
    }
    return "".join(mark for mark, true in chosen.items() if true)


def _share(arm: str, found: Summaries, key: str) -> str:
    known = FULL in found.arms and found.knows(arm, key)
    return f"{found.share(arm, key):.2f}" if known else ""


def text(difference: Difference | None, places: int) -> str:
    """A paired difference with its 95% interval; positive is better."""
    if difference is None:
        return ""
    mean, low, high = (
        f"{v:+.{places}f}" for v in (difference.mean, difference.low, difference.high)
    )
    return f"{mean} ({low} to {high})"


def beside(found: Summaries, arm: str, other: str | None) -> str:
    """The mean difference and its standard error, bold if its 95% interval is without zero."""
    return short(None if other is None else found.difference(arm, other), digits(found))


def short(one: Difference | None, places: int) -> str:
    """A difference and its standard error, bold if its 95% interval is without zero."""
    if one is None:
        return ""
    words = f"{one.mean:+.{places}f} ± {one.error:.{places}f}"
    return f"**{words}**" if one.low > 0 or one.high < 0 else words


def digits(found: Summaries) -> int:
    """The decimals of a result."""
    return 3 if found.metric == "loss" else 2


def verdict(found: Summaries) -> str:
    """Which arms are and are not distinguishable from fixed low rank of the same FLOPs."""
    pairs = {
        arm: difference
        for arm in found.arms
        if (other := found.counterpart(arm)) and (difference := found.difference(arm, other))
    }
    return _sentences(pairs, "fixed low rank of the same FLOPs")


def verdict_to_full(found: Summaries) -> str:
    """Which arms are and are not distinguishable from full rank, and which meet it cheaply."""
    pairs = {
        arm: difference
        for arm in found.arms
        if arm != FULL and (difference := found.difference(arm, FULL))
    }
    return f"{_sentences(pairs, 'full rank')} {_met(found)}".strip()


def fronts(found: Summaries) -> str:
    """Which arms stand on the front against each cost."""
    costs = {"FLOPs": ALL_FLOPS, "memory": "memory_peak", "CPU seconds": SECONDS}
    parts = [
        f"against {words}: {'; '.join(arm for arm in found.arms if arm in found.front(cost))}."
        for words, cost in costs.items()
        if found.all_know(cost)
    ]
    return "On the front " + " On that ".join(parts)


def _met(found: Summaries) -> str:
    if FULL in found.lost:
        return "Whether full rank is met cannot be said: it diverged."
    met = [
        f"{name} ({found.share(name, ALL_FLOPS):.3f}, last network {one.mean('end_flops'):.3f})"
        for name, one in found.arms.items()
        if found.cheap(name) and found.meets_full(name)
    ]
    what = (
        f"within one standard error at {CHEAP:g} of the FLOPs or less, all counted, with a last"
        f" network of {CHEAP_END:g} or less"
    )
    return f"Full rank is met {what}, by: {'; '.join(met) or 'no arm'}."


def _sentences(pairs: dict[str, Difference], other: str) -> str:
    """By paired t-tests with Holm's correction."""
    differ = corrected(pairs)
    better = [arm for arm in differ if pairs[arm].mean > 0]
    worse = [arm for arm in differ if pairs[arm].mean < 0]
    parts = ((better, "Better than"), (worse, "Worse than"))
    found = [f"{words} {other}: {'; '.join(arms)}." for arms, words in parts if arms]
    same = len(pairs) - len(better) - len(worse)
    if same and found:
        rest = "other one is" if same == 1 else f"other {same} are"
        found.append(f"The {rest} not distinguishable from it.")
    elif same:
        found.append(f"No arm is distinguishable from {other}.")
    return " ".join(found)


_COLUMNS = {
    "full rank": "full rank",
    "fixed low rank": "fixed {:g} FLOPs",
    "smaller network": "narrower, {:g}",
    "shorter training": "shorter, {:g}",
    "decay": "decay {:g}",
    "the paper's order": "paper, low-rank ending",
}


def deciding(problems: Sequence[Summaries], budget: float) -> str:
    """The main arms of some problems at a budget; all FLOPs in parentheses."""
    lines: list[Sequence[str]] = []
    for found in problems:
        what = f"{found.experiment.short}: {found.metric}{'' if found.metric == 'loss' else ', %'}"
        names = [name.format(budget) for name in _COLUMNS.values()]
        names = [found.decay(f"{budget:g}") if a.startswith("decay") else a for a in names]
        chosen = [found.arms.get(name) for name in names]
        n = found.arms[FULL].n
        lines.append((what, str(n), *(_cell(one, found) for one in chosen)))
    return markdown(("problem", "n", *_COLUMNS), lines)


def _cell(one: Summary | None, found: Summaries) -> str:
    if one is None:
        return ""
    short = "" if one.arm in found.whole else f", n = {_n(one, found)}"
    return f"{one.text(digits(found))} ({found.share(one.arm, ALL_FLOPS):.2f}x{short})"


def restored(found: Summaries) -> str:
    """What inflation restored: effective ranks around the full-rank phase, by layer."""
    head = ("arm", "layer", "inflated", "before its end", "after it", "end", "full rank's end")
    return f"**{found.experiment.short}**\n\n{markdown(head, _restored(found), words=2)}"


def _restored(found: Summaries) -> Iterator[tuple[str, ...]]:
    """Shares of the largest possible rank, means over seeds."""
    full = found.arms.get(FULL)
    for name, one in found.arms.items():
        if not name.startswith("paper") or "," in name.partition(", ")[2] or full is None:
            continue
        if min(len(_later(run)) for run in one.runs) < 2:
            continue
        layers = list(one.runs[0]["full_ranks"])
        for layer in (*layers, None):
            cells = (*around(one, layer), at_end(one, layer), at_end(full, layer))
            yield (name, layer or "mean", *(f"{cell:.2f}" for cell in cells))


def around(one: Summary, layer: str | None = None) -> tuple[float, float, float]:
    """The effective rank after inflation, and before and after deflation, as shares.

    Args:
        one: an arm that inflates and deflates each layer once.
        layer: the layer; None: the mean of all.
    """
    sides = ((0, "after"), (1, "before"), (1, "after"))
    return tuple(  # pyright: ignore
        fmean(
            values[side][0] / run["full_ranks"][path]
            for run in one.runs
            for path, values in _later(run)[place]["layers"].items()
            if layer in (None, path)
        )
        for place, side in sides
    )


def _later(run: Run) -> list[Any]:
    """The changes after the first plan."""
    return [change for change in run["changes"] if change["step"] > 0]


def at_end(one: Summary, layer: str | None = None) -> float:
    """The effective rank at the end of training, as a share, of a layer or the mean of all."""
    return fmean(
        values[0] / run["full_ranks"][path]
        for run in one.runs
        for path, values in run["points"][-1]["spectra"].items()
        if layer in (None, path)
    )
