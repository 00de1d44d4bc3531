"""Which setting an arm gets: found on seeds and data that are not reported.

First the rate: all of the arm's rates, and as long as none is better than that at an end, up to
twice, one more beyond it, twice or half as large. Then, at that rate, each other start, decay and
coefficient by itself; those that are better are taken. Without seeds to tune on, the rate is the
problem's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from benchmarks.training.harness.arm import Arm, Setting
from benchmarks.training.harness.record import Run

_OTHERS = ("start", "decay", "coefficient")
_BEYOND = 2  # rates beyond an end of the given ones
Found = dict[Setting, dict[int, float]]  # by seed, the result; larger is better


def found(
    arm: Arm, runs: Sequence[Run], metric: str, higher: bool, seeds: Collection[int]
) -> Found:
    """What the tuning runs of an arm as it is now gave; what diverged is minus infinity."""
    results: Found = {}
    for run in runs:
        if run["part"] == "valid" and run["seed"] in seeds and arm.made(run):
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
    if not results:
        return _first(arm)
    *_, (first, *others) = _stages(arm, results)
    better: dict[str, Any] = {}
    for name in _OTHERS:  # each that was better by itself
        changed = [s for s in others if getattr(s, name) != getattr(first, name)]
        better[name] = getattr(_best([first, *changed], results), name)
    return replace(first, **better)


def _stages(arm: Arm, results: Found) -> Iterator[list[Setting]]:
    """What is compared in each stage; the later ones depend on the results of the earlier."""
    rates = [replace(_first(arm), rate=rate) for rate in sorted(arm.rates)]
    yield rates
    for _ in range(_BEYOND if len(rates) > 1 else 0):
        low, high = rates[0], rates[-1]
        if (best := _mean(_best(rates, results), results)) == _mean(low, results):
            rates = [replace(low, rate=low.rate / 2), *rates]
        elif best == _mean(high, results):
            rates = [*rates, replace(high, rate=high.rate * 2)]
        else:
            break
        yield rates
    best = _best(rates, results)
    tried = [(name, value) for name in _OTHERS for value in getattr(arm, f"{name}s")]
    others = [replace(best, **{name: value}) for name, value in tried]
    yield [best, *(other for other in others if other != best)]


def _first(arm: Arm) -> Setting:
    return Setting(1.0, arm.starts[0], arm.decays[0], arm.coefficients[0])


def _best(settings: Sequence[Setting], results: Found) -> Setting:
    """The best of these; of equals the first."""
    return max(settings, key=lambda setting: _mean(setting, results))


def _mean(setting: Setting, results: Found) -> float:
    """The mean result of a setting; equal means are equal numbers, whatever their seeds' order."""
    return round(fmean(results.get(setting, {0: -math.inf}).values()), 9)


def at_an_end(arm: Arm, results: Found) -> bool:
    """Whether the chosen rate is the lowest or highest of several that were tried."""
    rates = {setting.rate for setting in results}
    return len(rates) > 1 and chosen(arm, results).rate in (min(rates), max(rates))


def as_data(setting: Setting) -> dict[str, object]:
    """As in a record."""
    return asdict(setting)
