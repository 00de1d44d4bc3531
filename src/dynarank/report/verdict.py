"""The first line of a report: one sentence that says what a reader should take from the runs.

It claims no more than the runs allow: a difference is called one only by the test that the page
shows (Welch's, with Holm's correction); at one run a schedule the differences are told, and that
another seed may change them; what diverged, is unfinished or missing is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, cast

from dynarank.records import ChangeRecord, EpochRecord, Metric, PhaseRecord, Run, StepRecord
from dynarank.report.comparison import Pair, compare_pairs, interval_text
from dynarank.report.formats import difference_text, joined, number, plural, score_text
from dynarank.report.grouping import by_schedule, final_scores, last_losses

__all__ = ["verdict"]

_MOST_CLAUSES = 3
_MOST_NAMES = 3
_EQUAL = 0.02  # FLOPs that differ by less are called the same
_NO_SETTINGS = ("seed", "crc", "data", "format", "noise")  # of config.json
_LOSS = Metric(name="loss", higher_is_better=False, percent=False)
_Value = Callable[[Run], float | None]


def verdict(runs: Sequence[Run]) -> str:
    """Say in one sentence what to take from the runs; one for each recipe, if there are several.

    Schedules are compared by their test score, or by their last test loss if no run has a score:
    those of one form with full rank, those that change form with the best of one form.

    Args:
        runs: at least one.
    """
    recipes: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        recipes.setdefault((run.header.recipe, run.header.metric.name), []).append(run)
    if len(recipes) == 1:
        return _sentence(runs)
    told = [f"{recipe}: {_sentence(group)}" for (recipe, _), group in recipes.items()]
    left = len(told) - _MOST_CLAUSES
    return " ".join([*told[:_MOST_CLAUSES], *([f"{left} more below."] if left > 0 else [])])


@dataclass(frozen=True)
class _Schedule:
    """What the runs of one schedule have come to; ``scores`` are finite, one a run."""

    name: str
    kind: Literal["full-rank", "fixed", "dynamic"]
    scores: tuple[float, ...]
    flops: float
    runs: int
    diverged: int
    unfinished: int
    seeds_differ: bool
    alike: bool

    @property
    def mean(self) -> float:
        return fmean(self.scores)

    @property
    def n(self) -> int:
        return len(self.scores) if self.seeds_differ and self.alike else 1


def _sentence(runs: Sequence[Run]) -> str:
    metric, value = _measure(runs)
    prefix = f"{runs[0].header.recipe}: "
    groups = by_schedule(runs)
    found = [_summed(name.removeprefix(prefix), g, value) for name, g in groups.items()]
    judged = [one for one in found if one.scores]
    if len(judged) > 1:
        said = _compared(judged, metric)
    else:
        said = _alone(judged[0], metric) if judged else _unscored(found)
    return "; ".join([said, *_caveats(found, runs, metric)]) + "."


def _measure(runs: Sequence[Run]) -> tuple[Metric, _Value]:
    """The score, as of the summary; the last test loss, if no run has a score."""
    if final_scores(runs):
        return runs[0].header.metric, lambda run: run.summary and run.summary.test_score
    return _LOSS, lambda run: last_losses(run)[0]


def _summed(name: str, runs: Sequence[Run], value: _Value) -> _Schedule:
    lost = [run for run in runs if _diverged(run, value)]
    ended = [run for run in runs if run.summary is not None and run not in lost]
    scores = [score for run in ended if (score := value(run)) is not None]
    flops = [run.summary.relative_flops for run in ended if run.summary is not None]
    seeds = [run.header.seed for run in ended if run.header.seed is not None]
    return _Schedule(
        name=name,
        kind=_kind(name, runs),
        scores=tuple(scores),
        flops=fmean(flops) if flops and all(map(math.isfinite, flops)) else math.nan,
        runs=len(runs),
        diverged=len(lost),
        unfinished=sum(run.summary is None for run in runs if run not in lost),
        seeds_differ=len(set(seeds)) == len(seeds),
        alike=_alike(ended),
    )


def _alike(runs: Sequence[Run]) -> bool:
    """Whether runs differ in nothing but their seed, as far as settings are recorded."""
    lengths = {run.header.epochs * run.header.steps_per_epoch for run in runs}
    found = [_settings(run) for run in runs if run.config]
    return len(lengths) <= 1 and all(one == found[0] for one in found)


def _settings(run: Run) -> dict[str, Any]:
    config = {key: value for key, value in run.config.items() if key not in _NO_SETTINGS}
    own: object = config.get("recorder")  # of a loop of one's own
    if isinstance(own, dict):
        config["recorder"] = {k: v for k, v in cast("dict[str, Any]", own).items() if k != "seed"}
    return config


def _diverged(run: Run, value: _Value) -> bool:
    """Whether it ended at a loss or with a score that is not finite."""
    last = [run.all(EpochRecord)[-1:], run.all(StepRecord)[-1:]]
    ends = [record.train_loss for records in last for record in records]
    ends += [e.test_loss for e in run.all(EpochRecord)[-1:]]
    ends += [value(run)] if run.summary is not None else []
    return any(end is not None and not math.isfinite(end) for end in ends)


def _kind(name: str, runs: Sequence[Run]) -> Literal["full-rank", "fixed", "dynamic"]:
    """Full-rank throughout, of one form throughout, or changing form: as recorded, not as named."""
    phases = [
        {f for f, count in p.forms.items() if count} for r in runs for p in r.all(PhaseRecord)
    ]
    changed = any(change.step > 0 for run in runs for change in run.all(ChangeRecord))
    forms = set().union(*phases)
    if changed:
        return "dynamic"
    if forms <= {"full-rank"} and (phases or name == "full-rank"):
        return "full-rank"
    return "fixed"


def _alone(one: _Schedule, metric: Metric) -> str:
    score = _written(one.mean, metric)
    result = f"{score} test {metric.name}" if metric.percent else f"a test {metric.name} of {score}"
    cost = "" if one.kind == "full-rank" else _cost(one, None)
    told = f"{one.name} reached {result}{cost} (n = {one.n})"
    return f"{told}, with no other schedule to compare it with"


def _unscored(found: Sequence[_Schedule]) -> str:
    ended = [one for one in found if one.runs > one.diverged + one.unfinished]
    if not ended:
        open_ = any(one.unfinished for one in found)
        return f"Nothing can be concluded{' yet' if open_ else ''}"
    costs = [f"{o.name} took {number(o.flops, 2)}x" for o in ended if math.isfinite(o.flops)]
    if not costs:
        return "Nothing can be concluded: no test score, loss or cost was recorded"
    told = f"{_some(costs)} the training FLOPs of full rank"
    return f"{told}; no test score or loss was recorded, so what that costs in quality is unknown"


def _compared(judged: Sequence[_Schedule], metric: Metric) -> str:
    tests, pairs = _tests(judged), _pairs(judged, metric)
    shown = pairs[:_MOST_CLAUSES]
    said = [_against(one, base, tests.get((one.name, base.name)), metric) for one, base in shown]
    if len(pairs) > len(shown):
        said.append(f"{plural(len(pairs) - len(shown), 'schedule')} more in the table")
    return f"Test {metric.name}: {'; '.join(said)}{_evidence(shown, tests)}"


def _pairs(judged: Sequence[_Schedule], metric: Metric) -> list[tuple[_Schedule, _Schedule]]:
    """Which schedule is judged by which: the best of each kind first, then the others."""
    sign = 1 if metric.higher_is_better else -1
    ranked = sorted(judged, key=lambda one: (-sign * one.mean, one.flops))
    full, fixed, dynamic = (
        [one for one in ranked if one.kind == kind] for kind in ("full-rank", "fixed", "dynamic")
    )
    base = (full or fixed or dynamic)[0]
    still = [(one, base) for one in (*full, *fixed) if one is not base]
    moving = [(one, (fixed or full or dynamic)[0]) for one in dynamic if one is not base]
    return [*still[:1], *moving[:1], *still[1:], *moving[1:]]


def _tests(judged: Sequence[_Schedule]) -> dict[tuple[str, str], Pair]:
    """The test of each pair that can be tested, in both directions."""
    whole = {one.name: one.scores for one in judged if one.n > 1 and one.diverged == 0}
    try:
        tests = {(pair.first, pair.second): pair for pair in compare_pairs(whole)}
    except ImportError:  # without scipy no pair is tested, as is said
        return {}
    return tests | {
        (b, a): replace(p, first=b, second=a, difference=-p.difference, low=-p.high, high=-p.low)
        for (a, b), p in tests.items()
    }


def _against(one: _Schedule, base: _Schedule, test: Pair | None, metric: Metric) -> str:
    gain = (one.mean - base.mean) * (1 if metric.higher_is_better else -1)
    by = difference_text(abs(gain), metric)
    cost = _cost(one, base)
    if test is not None and test.significant:
        return f"{one.name} {'beat' if gain > 0 else 'lost to'} {base.name} by {by}{cost}"
    same = _written(one.mean, metric) == _written(base.mean, metric)
    if test is None and one.kind == "dynamic" and base.kind == "fixed" and (gain <= 0 or same):
        if one.flops >= (1 - _EQUAL) * base.flops:
            told = "the same score" if same else f"{by} worse"
            return f"{one.name} brought nothing over {base.name} ({told}{cost})"
    if test is not None:
        within = interval_text(test.low, test.high, metric)
        difference = difference_text(test.difference, metric)
        return f"{one.name} cannot be told from {base.name} ({difference}, {within}){cost}"
    if same:
        return f"{one.name} matched {base.name}{cost}"
    return f"{one.name} was {by} {'better' if gain > 0 else 'worse'} than {base.name}{cost}"


def _cost(one: _Schedule, base: _Schedule | None) -> str:
    """The training FLOPs: of full rank, or of the schedule it is compared with."""
    relative = one.flops / (1 if base is None else base.flops or math.nan)
    if not math.isfinite(relative):
        return ""
    if base is None:
        return f" at {number(relative, 2)}x the training FLOPs of full rank"
    if abs(relative - 1) < _EQUAL:
        return " at the same FLOPs"
    return f" at {number(relative, 2)}x {'the' if base.kind == 'full-rank' else 'its'} FLOPs"


def _written(score: float, metric: Metric) -> str:
    return score_text(score, metric, 2)


def _evidence(
    shown: Sequence[tuple[_Schedule, _Schedule]], tests: Mapping[tuple[str, str], Pair]
) -> str:
    """On how many runs it rests, and which differences are not tested."""
    sizes = sorted({one.n for pair in shown for one in pair})
    if sizes == [1]:
        every = " all" if len(shown) > 1 else ""
        return f",{every} at n = 1: another seed may change a score by as much"
    n = f"n = {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")
    untested = [
        f"{one.name} against {base.name}"
        for one, base in shown
        if (one.name, base.name) not in tests
    ]
    return f" ({n}{f'; not tested: {joined(untested)}' if untested else ''})"


def _caveats(found: Sequence[_Schedule], runs: Sequence[Run], metric: Metric) -> list[str]:
    """What is missing from the comparison, or against it."""
    judged = [one for one in found if one.scores]
    said: list[str] = []
    if len(judged) > 1 and not any(one.kind == "full-rank" for one in found):
        said.append("full-rank was not run")
    for lost, verb in (("diverged", "diverged"), ("unfinished", "did not finish")):
        told = [_part(one, getattr(one, lost)) for one in found if getattr(one, lost)]
        said += [f"{_some(told)} {verb}"] if told else []
    ended = [one for one in found if one.runs > one.diverged + one.unfinished]
    scoreless = [one.name for one in ended if judged and not one.scores]
    said += [f"no test {metric.name} was recorded for {_some(scoreless)}"] if scoreless else []
    damaged = [name for name, group in by_schedule(runs).items() if any(r.damage for r in group)]
    said += [f"the records of {_some(damaged)} are damaged"] if damaged else []
    unlike = [one.name for one in judged if not one.alike]
    said += [f"runs of {_some(unlike)} differ in settings and count as one"] if unlike else []
    same = [one.name for one in judged if one.alike and not one.seeds_differ]
    said += [f"runs of {_some(same)} share a seed and count as one"] if same else []
    if len({run.header.epochs for run in runs}) > 1:
        said.append("the runs differ in epochs")
    elif len({run.header.steps_per_epoch for run in runs}) > 1:
        said.append("the runs differ in steps")
    return said


def _part(one: _Schedule, count: int) -> str:
    return one.name if count == one.runs else f"{count} of {one.runs} runs of {one.name}"


def _some(names: Sequence[str]) -> str:
    left = len(names) - _MOST_NAMES
    return joined([*names[:_MOST_NAMES], *([f"{left:,} more"] if left > 0 else [])])
