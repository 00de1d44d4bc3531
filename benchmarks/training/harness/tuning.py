"""Which setting an arm gets: found on seeds and data that are not reported.

First the rate: all of the arm's rates, and as long as the best is at an end, up to twice, one more
beyond it, twice or half as large. Then, at that rate, each other start and decay by itself; those
that are better are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from statistics import fmean

from benchmarks.training.harness.arm import Arm, Setting
from benchmarks.training.harness.store import Run

_BEYOND = 2  # rates beyond an end of the given ones
Found = dict[Setting, dict[int, float]]  # by seed, the result; larger is better


def found(arm: Arm, runs: Sequence[Run], metric: str, higher: bool) -> Found:
    """What the tuning runs of an arm, of its length, gave; what diverged is minus infinity."""
    results: Found = {}
    for run in runs:
        long = run.get("length", arm.length) == arm.length
        if run["part"] == "valid" and long and arm.made(run):
            value = run["result"].get(metric)
            good = value is not None and math.isfinite(value)
            known = results.setdefault(Setting(**run["setting"]), {})
            known[run["seed"]] = (value if higher else -value) if good else -math.inf
    return results


def next_settings(arm: Arm, results: Found, seeds: Sequence[int]) -> list[Setting]:
    """The settings that are to be run next; empty if the arm is tuned."""
    wanted: list[Setting] = []
    for stage in _stages(arm, results):
        wanted = [s for s in stage if set(seeds) - set(results.get(s, {}))]
        if wanted:
            break
    return wanted


def chosen(arm: Arm, results: Found) -> Setting:
    """The setting of a tuned arm."""
    *_, last = _stages(arm, results)
    best = _best(last, results)
    first = Setting(best.rate)
    # Of the starts and decays, each that was better by itself.
    start = _best([s for s in last if s.decay == first.decay], results).start
    decay = _best([s for s in last if s.start == first.start], results).decay
    return replace(first, start=start, decay=decay)


def _stages(arm: Arm, results: Found) -> Iterator[list[Setting]]:
    """What is compared in each stage; the later ones depend on the results of the earlier."""
    rates = [Setting(rate) for rate in sorted(arm.rates)]
    yield rates
    for _ in range(_BEYOND if len(rates) > 1 else 0):
        best = _best(rates, results)
        if best == rates[0]:
            rates = [Setting(best.rate / 2), *rates]
        elif best == rates[-1]:
            rates = [*rates, Setting(best.rate * 2)]
        else:
            break
        yield rates
    best = _best(rates, results)
    others = [replace(best, start=start) for start in arm.starts if start != best.start]
    others += [replace(best, decay=decay) for decay in arm.decays if decay != best.decay]
    yield [best, *others]


def _best(settings: Sequence[Setting], results: Found) -> Setting:
    """The best of these; of equals the first."""
    return max(settings, key=lambda s: fmean(results.get(s, {0: -math.inf}).values()))


def as_data(setting: Setting) -> dict[str, object]:
    """As in a record."""
    return asdict(setting)
