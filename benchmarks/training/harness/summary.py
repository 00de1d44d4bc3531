"""The reported runs of an experiment, summarized for each arm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from benchmarks.training.harness.calibration import share
from benchmarks.training.harness.definition import of_one_problem
from benchmarks.training.harness.experiment import FULL, Experiment, get
from benchmarks.training.harness.jobs import (
    at_an_end,
    first_of_each_seed,
    matching,
    never,
    others,
    timed,
    timed_on,
)
from benchmarks.training.harness.record import Run
from benchmarks.training.harness.statistics import Difference, on_front, paired, spread
from benchmarks.training.harness.store import ROOT, Store

ALL_FLOPS, SECONDS = "all_flops", "cpu_seconds"
FEW = ", 8 batches"
"""Ends the name of an arm that calibrates on fewer batches than the arm named before it."""
CHEAP, CHEAP_END = 0.65, 0.6
"""The most that an arm and its last network may cost to count as cheap, of full rank's FLOPs."""
ALIKE = 0.015
"""Arms whose shares of the FLOPs differ by no more are compared at equal FLOPs."""


@dataclass(frozen=True)
class Summary:
    """The runs of one arm.

    Args:
        arm: its name.
        runs: its reported runs.
        metric: what is reported.
        timed: its runs beside which full rank was timed, on the hardware of all arms' seconds.
    """

    arm: str
    runs: Sequence[Run]
    metric: str
    timed: Sequence[Run]

    @cached_property
    def values(self) -> dict[int, float]:
        """The results by seed."""
        return {run["seed"]: run["result"][self.metric] for run in self.runs}

    @property
    def n(self) -> int:
        """The number of runs."""
        return len(self.runs)

    @property
    def result(self) -> float:
        """The mean result."""
        return fmean(self.values.values())

    @property
    def spread(self) -> float:
        """The standard deviation of the results over seeds."""
        return spread(list(self.values.values()))

    def text(self, places: int) -> str:
        """The mean result ± the standard deviation, of several runs."""
        spread = f" ± {self.spread:.{places}f}" if self.n > 1 else ""
        return f"{self.result:.{places}f}{spread}"

    def mean(self, key: str) -> float:
        """The mean of a cost."""
        return fmean(run[key] for run in self.runs)


class Summaries:
    """All arms of an experiment that have reported runs.

    Args:
        name: of the experiment.
        runs: its records; None: those in the repository.
        experiment: the experiment; None: that of this name.
        folder: where the records are, and what was counted besides.
    """

    def __init__(
        self,
        name: str,
        runs: Sequence[Run] | None = None,
        experiment: Experiment | None = None,
        folder: Path = ROOT,
    ) -> None:
        self.name, self.experiment, self.folder = name, experiment or get(name), folder
        records = Store(name, folder).runs(self.experiment.metric) if runs is None else runs
        same = of_one_problem(records)
        every = {arm.name: matching(arm, self.experiment, same) for arm in self.experiment.arms}
        counted = [run for runs in every.values() for run in first_of_each_seed(runs)]
        self.others = len(records) - len(same)
        """Runs on record of what the problem was before."""
        self.others_of = {arm: len(of) for arm, of in others(self.experiment, same).items()}
        """By arm, how many are of what it was before."""
        self.never = {
            arm.name: why
            for arm in self.experiment.arms
            if (why := never(arm, self.experiment, same))
        }
        """Why some arms are never run."""
        self.hardware = timed_on(every.values())
        """That on which seconds are compared."""
        self.repeated, self.twice = set[str](), list[str]()
        """The arms of which a run was repeated for its seconds; other runs on record again."""
        for name, runs in every.items():
            self._note_again(name, runs)
        self.metric: str = self.experiment.metric
        self.sign = 1 if self.experiment.higher else -1
        self.arms = {
            arm.name: Summary(arm.name, of_arm, self.metric, timed(every[arm.name], self.hardware))
            for arm in self.experiment.arms
            if (of_arm := [run for run in counted if run["arm"] == arm.name and run["result"]])
        }
        self.diverged = [run for run in counted if not run["result"]]
        self.at_an_end = {
            a for a in self.arms if at_an_end(self.experiment.by_name[a], self.experiment, same)
        }
        """The arms whose best rate is the lowest or highest that was tried."""
        self.lost = {run["arm"] for run in self.diverged}
        """The arms that diverged on some seed: the others are no fair sample."""

    def _note_again(self, name: str, runs: Sequence[Run]) -> None:
        """Note what of an arm is on record again; the first run of each seed counts."""
        first = first_of_each_seed(runs)
        again = [run for run in runs if all(run is not one for one in first)]
        beside = [] if timed(first, self.hardware) else timed(again, self.hardware)
        if beside:
            self.repeated.add(name)
        seeds = [run["seed"] for run in again if all(run is not one for one in beside)]
        self.twice += [f"{name}, seed {seed}" for seed in dict.fromkeys(seeds)]

    @property
    def whole(self) -> set[str]:
        """The arms that have run on all seeds of full rank, and diverged on none."""
        seeds = self.arms[FULL].values.keys() if FULL in self.arms else set()
        return {n for n, one in self.arms.items() if seeds <= one.values.keys()} - self.lost

    def difference(self, arm: str, other: str) -> Difference | None:
        """The paired difference of two arms; positive: the first is better.

        None: they have fewer than two seeds in common, or one of them diverged on some seed.
        """
        if other not in self.arms or {arm, other} & self.lost:
            return None
        return self._paired(self.arms[arm].values, self.arms[other].values)

    def further(self, arm: str) -> float | None:
        """An arm's FLOPs besides the steps, of full rank's training; None: not counted."""
        run = self.arms[arm].runs[0]
        return share(self.name, run, self.folder) if run["changes"] else 0.0

    def share(self, arm: str, cost: str) -> float:
        """The mean cost of an arm, relative to full rank; as it is if full rank has not run.

        All FLOPs are those of training and those besides, as far as they are counted.
        CPU seconds are relative to those of full rank at the pace that was timed beside each run.

        Raises:
            ValueError: no run of the arm has it.
        """
        if not self.knows(arm, cost):
            raise ValueError(f"full rank was timed beside no run of {arm!r}: `run` repeats one")
        if cost == SECONDS:
            return fmean(r["cpu_seconds"] / r["full_rank_seconds"] for r in self.arms[arm].timed)
        if cost == ALL_FLOPS:
            return self.share(arm, "flops") + (self.further(arm) or 0.0)
        full = self.arms[FULL].mean(cost) if FULL in self.arms else 1.0
        return self.arms[arm].mean(cost) / full

    def knows(self, arm: str, cost: str) -> bool:
        """Whether a cost of an arm is known: older records have no seconds beside full rank's."""
        return cost != SECONDS or bool(self.arms[arm].timed)

    def all_know(self, cost: str) -> bool:
        """Whether a cost of all arms is known."""
        return all(self.knows(arm, cost) for arm in self.arms)

    def decay(self, budget: str) -> str:
        """The decay of this budget that has run on the fewest batches a calibration."""
        few = f"decay {budget}{FEW}"
        return few if few in self.arms else f"decay {budget}"

    def counterpart(self, arm: str) -> str | None:
        """Fixed low rank of about the same FLOPs: that made for the arm, or else the nearest."""
        if arm == FULL or arm.startswith("fixed"):
            return None
        cost = self.arms[arm].mean("flops")
        distances = {
            name: distance
            for name, one in self.arms.items()
            if name.startswith("fixed") and (distance := abs(one.mean("flops") - cost)) <= ALIKE
        }
        if (like := f"fixed as {arm}") in distances:
            return like
        return min(distances, key=distances.__getitem__, default=None)

    def front(self, cost: str = ALL_FLOPS) -> set[str]:
        """The whole arms that no other of these beats at their cost or less, by means."""
        return on_front(
            {
                name: (round(self.share(name, cost), 4), self.sign * self.arms[name].result)
                for name in self.whole
            }
        )

    def best(self, arms: Iterable[str]) -> str | None:
        """The whole arm of the best mean among these, if there are any."""
        chosen = [arm for arm in arms if arm in self.whole]
        return max(chosen, key=lambda arm: self.sign * self.arms[arm].result, default=None)

    def picked(self, arms: Iterable[str]) -> dict[int, float]:
        """By seed, the result of that whole arm of these which is best on the other seeds.

        Picked and tested on the same seeds, the best of many arms would look better than it is.
        """
        chosen = {arm: self.arms[arm].values for arm in arms if arm in self.whole}
        seeds = self.arms[FULL].values if chosen else {}
        found: dict[int, float] = {}
        for seed in seeds if len(seeds) > 1 else ():
            others = [other for other in seeds if other != seed]
            means = {a: self.sign * fmean(vs[o] for o in others) for a, vs in chosen.items()}
            found[seed] = chosen[max(means, key=means.__getitem__)][seed]
        return found

    def beyond_full(self, results: Mapping[int, float]) -> Difference | None:
        """The paired difference of results by seed from full rank's; positive: they are better."""
        return None if FULL in self.lost else self._paired(results, self.arms[FULL].values)

    def _paired(self, *results: Mapping[int, float]) -> Difference | None:
        one, other = ({k: self.sign * v for k, v in values.items()} for values in results)
        return paired(one, other)

    def cheap(self, arm: str) -> bool:
        """Whether all FLOPs of an arm are counted, and they and those of its end are few."""
        if arm == FULL or self.further(arm) is None:
            return False
        end = self.arms[arm].mean("end_flops")
        return self.share(arm, ALL_FLOPS) <= CHEAP and end <= CHEAP_END

    def changes(self, arm: str) -> bool:
        """Whether layers change form or rank during the training of an arm."""
        return any(change["step"] for run in self.arms[arm].runs for change in run["changes"])

    def meets_full(self, arm: str) -> bool | None:
        """Whether the arm is no worse than full rank by more than a standard error.

        The standard error is that of the paired difference. None: it cannot be said.
        """
        found = self.difference(arm, FULL)
        return None if found is None else found.met
