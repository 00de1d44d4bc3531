"""The tables and sentences of docs/evidence.md, from the records."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.training.harness.statistics import Difference, holm
from benchmarks.training.harness.summary import FULL, Summaries, Summary

HEAD = (
    "arm", "n", "rate", "FLOPs", "last", "parameters", "memory", "CPU s", "result",
    "minus full rank", "minus fixed low rank",
)  # fmt: skip


def table(found: Summaries) -> str:
    """The table of an experiment; arms on the front of quality against FLOPs are bold."""
    front = found.front()
    rows = [_row(one, found, one.arm in front) for one in found.arms.values()]
    lines = [HEAD, ("---", *["--:"] * (len(HEAD) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(one: Summary, found: Summaries, bold: bool) -> tuple[str, ...]:
    full = found.arms.get(FULL, one)
    counterpart = found.counterpart(one.arm)
    return (
        f"**{one.arm}**" if bold else one.arm,
        _n(one, found),
        f"{one.runs[0]['setting']['rate']:g}{_marks(one)}",
        f"{one.mean('flops'):.3f}",
        f"{one.mean('end_flops'):.3f}",
        _share(one, full, "parameters_mean"),
        _share(one, full, "memory_peak"),
        _share(one, full, "cpu_seconds"),
        f"{one.result:.{digits(found)}f} ± {one.spread:.{digits(found)}f}",
        "" if one.arm == FULL else text(found.difference(one.arm, FULL), digits(found)),
        "" if counterpart is None else text(found.difference(one.arm, counterpart), digits(found)),
    )


def _n(one: Summary, found: Summaries) -> str:
    """How many runs; of how many, if some diverged."""
    lost = sum(run["arm"] == one.arm for run in found.diverged)
    return f"{one.n} of {one.n + lost}" if lost else str(one.n)


def _marks(one: Summary) -> str:
    """What else was chosen for fixed low rank: n, the norm of the draw; p, decay of the product."""
    setting = one.runs[0]["setting"]
    return ("n" if setting["start"] == "norm" else "") + (
        "p" if setting["decay"] == "product" else ""
    )


def _share(one: Summary, full: Summary, key: str) -> str:
    return f"{one.mean(key) / full.mean(key):.2f}"


def text(difference: Difference | None, places: int) -> str:
    """A paired difference with its 95% interval; positive is better."""
    if difference is None:
        return ""
    mean, low, high = (
        f"{v:+.{places}f}" for v in (difference.mean, difference.low, difference.high)
    )
    return f"{mean} ({low} to {high})"


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
    return f"{_sentences(pairs, 'full rank')} {_met(found)}"


def fronts(found: Summaries) -> str:
    """Which arms stand on the front against each cost."""
    costs = {"FLOPs": "flops", "memory": "memory_peak", "CPU seconds": "cpu_seconds"}
    parts = [
        f"against {words}: {'; '.join(arm for arm in found.arms if arm in found.front(cost))}."
        for words, cost in costs.items()
    ]
    return "On the front " + " On that ".join(parts)


def _met(found: Summaries) -> str:
    met = [
        f"{name} ({one.mean('flops'):.3f}, last network {one.mean('end_flops'):.3f})"
        for name, one in found.arms.items()
        if name != FULL
        and one.mean("flops") <= 0.65
        and one.mean("end_flops") <= 0.6
        and found.meets_full(name)
    ]
    what = (
        "within one standard error at 0.65 of the FLOPs or less, with a last network of 0.6 or less"
    )
    return f"Full rank is met {what}, by: {'; '.join(met) or 'no arm'}."


def _sentences(pairs: dict[str, Difference], other: str) -> str:
    """By paired t-tests with Holm's correction."""
    ps = dict(zip(pairs, holm([one.p for one in pairs.values()]), strict=True))
    better = [arm for arm, one in pairs.items() if ps[arm] < 0.05 and one.mean > 0]
    worse = [arm for arm, one in pairs.items() if ps[arm] < 0.05 and one.mean < 0]
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


def deciding(budgets: dict[str, tuple[Summaries, float]]) -> str:
    """The main arms of some problems, each at one budget; FLOPs in parentheses."""
    head = ("problem", "n", *_COLUMNS)
    lines = [head, ("---", *["--:"] * (len(head) - 1))]
    for what, (found, budget) in budgets.items():
        chosen = [found.arms.get(name.format(budget)) for name in _COLUMNS.values()]
        n = min(one.n for one in chosen if one is not None)
        lines.append((what, str(n), *(_cell(one, digits(found)) for one in chosen)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(one: Summary | None, places: int) -> str:
    if one is None:
        return ""
    return f"{one.result:.{places}f} ± {one.spread:.{places}f} ({one.mean('flops'):.2f}x)"


def restored(found: Summaries) -> str:
    """What inflation restored: the mean effective rank of the layers around the full-rank phase."""
    head = ("arm", "n", "start of full rank", "its end", "after", "end of the run", "full rank's")
    lines = [head, ("---", *["--:"] * (len(head) - 1)), *_restored(found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _restored(found: Summaries) -> Iterator[tuple[str, ...]]:
    """Effective ranks as shares of the largest possible rank, means over layers and seeds."""
    full = found.arms.get(FULL)
    for name, one in found.arms.items():
        inflations = [[c for c in run["changes"] if c["step"] > 0] for run in one.runs]
        if not name.startswith("paper") or min(map(len, inflations)) < 2 or full is None:
            continue
        first, last = ([changes[i] for changes in inflations] for i in (0, 1))
        cells = (
            _change(one, first, "after"), _change(one, last, "before"), _change(one, last, "after"),
            _end(one), _end(full),
        )  # fmt: skip
        yield (name, str(one.n), *(f"{cell:.3f}" for cell in cells))


def _change(one: Summary, changes: list[dict], side: str) -> float:
    """The mean effective rank before or after a change, as a share of the largest."""
    shares = [
        layer[side][0] / run["full_ranks"][path]
        for run, change in zip(one.runs, changes, strict=True)
        for path, layer in change["layers"].items()
        if layer[side]
    ]
    return sum(shares) / len(shares)


def _end(one: Summary) -> float:
    shares = [
        values[0] / run["full_ranks"][path]
        for run in one.runs
        for path, values in run["points"][-1]["spectra"].items()
    ]
    return sum(shares) / len(shares)
