"""Which runs of an experiment are missing, and can be run now.

An arm is tuned before its seeds are run; fixed low rank that spends what another arm spent waits
for all seeds of that arm. Arms that were not all timed on one machine run once more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from benchmarks.training.harness import tuning
from benchmarks.training.harness.arm import Arm, Setting
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.harness.record import Run
from benchmarks.training.harness.tuning import Found, as_data, chosen, found, next_settings
from benchmarks.training.problems.problem import Part
from dynarank.schedules import low_rank
from dynarank.schedules.base import RankSchedule


@dataclass(frozen=True)
class Job:
    """A run: an arm with a setting on a seed, and the part of the data that it is tested on."""

    experiment: str
    arm: str
    setting: Setting
    seed: int
    part: Part

    @property
    def key(self) -> str:
        """A name of the job for files."""
        setting = "-".join(map(str, as_data(self.setting).values()))
        words = f"{self.experiment} {self.arm} {setting} {self.part} {self.seed}"
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in words)


def ready(
    name: str, experiment: Experiment, runs: Sequence[Run], hardware: str | None = None
) -> list[Job]:
    """The missing runs that can be run now: tuning first, then seed by seed, then for seconds."""
    tuning = dict.fromkeys(_tuning(name, experiment, runs))
    timing = (
        Job(name, arm.name, Setting(**run["setting"]), run["seed"], "test")
        for arm, run in untimed(experiment, runs, hardware)
    )
    return [*tuning, *_reported(name, experiment, runs), *timing]


def reported(experiment: Experiment, runs: Sequence[Run]) -> list[Run]:
    """The runs that count, of all arms."""
    return [run for arm in experiment.arms for run in counted(arm, experiment, runs)]


def counted(arm: Arm, experiment: Experiment, runs: Sequence[Run]) -> list[Run]:
    """The runs of an arm that count: of each seed the first with what is chosen for it now.

    Setting and schedule change when more is tuned; what was run before stays on record.
    """
    return first_of_each_seed(matching(arm, experiment, runs))


def first_of_each_seed(runs: Sequence[Run]) -> list[Run]:
    """The first of these runs on each seed, by seed."""
    first: dict[int, Run] = {}
    for run in runs:
        first.setdefault(run["seed"], run)
    return [first[seed] for seed in sorted(first)]


def timed(runs: Sequence[Run], hardware: str) -> list[Run]:
    """Those of an arm's runs on this hardware beside which steps of full rank were timed."""
    return [r for r in runs if r.get("full_rank_seconds") and r["result"] and _on(r) == hardware]


def timed_on(arms: Collection[Sequence[Run]]) -> str:
    """The hardware on which most arms are timed, of the runs of each; of equals, the last used."""
    runs = sorted((run for mine in arms for run in mine), key=_started, reverse=True)
    used = list(dict.fromkeys(map(_on, runs))) or [""]
    return max(used, key=lambda one: sum(bool(timed(mine, one)) for mine in arms))


def untimed(
    experiment: Experiment, runs: Sequence[Run], hardware: str | None = None
) -> Iterator[tuple[Arm, Run]]:
    """The arms to be timed on this hardware, or on that of most, each with a run to repeat.

    They have run on all seeds. Where one machine has timed all of them, none is left; what was
    timed on different machines cannot be compared.
    """
    every = [(arm, matching(arm, experiment, runs)) for arm in experiment.arms]
    seeds = set(experiment.seeds)
    whole = [(arm, mine) for arm, mine in every if {run["seed"] for run in mine} == seeds]
    where = timed_on([mine for _, mine in whole])
    if all(timed(mine, where) for _, mine in whole):
        return
    for arm, mine in whole:
        tried = any(_on(r) == (hardware or where) and "full_rank_seconds" in r for r in mine)
        first = next((run for run in first_of_each_seed(mine) if run["result"]), None)
        if first is not None and not tried:
            yield arm, first


def _on(run: Run) -> str:
    return run.get("hardware", "")


def _started(run: Run) -> str:
    return run.get("started", "")


def matching(arm: Arm, experiment: Experiment, runs: Sequence[Run]) -> list[Run]:
    """The runs of an arm on reported seeds, with what is chosen for it now."""
    setting, now = setting_of(arm, experiment, runs), as_run(arm, experiment, runs, "test")
    if setting is None or now is None:
        return []
    wanted = [run for run in runs if run["part"] == "test" and run["seed"] in experiment.seeds]
    return [run for run in wanted if now.made(run) and Setting(**run["setting"]) == setting]


def as_run(arm: Arm, experiment: Experiment, runs: Sequence[Run], part: Part) -> Arm | None:
    """An arm with the schedule and length of its runs; None: its schedule waits for others."""
    schedule: Any = schedule_of(arm, experiment, runs)
    if schedule is WAITING:
        return None
    share = experiment.tuning_length if part == "valid" else 1.0
    return replace(arm, schedule=schedule, length=share * arm.length)


def others(experiment: Experiment, runs: Sequence[Run]) -> dict[str, list[list[str]]]:
    """By arm, what has changed of it since each of its runs that do not count for this."""
    found = {arm.name: _others(arm, experiment, runs) for arm in experiment.arms}
    return {name: changes for name, changes in found.items() if changes}


def _others(arm: Arm, experiment: Experiment, runs: Sequence[Run]) -> list[list[str]]:
    parts: tuple[Part, ...] = ("valid", "test")
    now = {part: as_run(arm, experiment, runs, part) for part in parts}
    mine = [(run, now[run["part"]]) for run in runs if run["arm"] == arm.name]
    return [what for run, one in mine if one is not None and (what := one.changed(run))]


def _tuning(name: str, experiment: Experiment, runs: Sequence[Run]) -> Iterator[Job]:
    for arm in experiment.arms:
        lead = experiment.tuned(arm)
        if schedule_of(lead, experiment, runs) is WAITING:
            continue
        results = _found(lead, experiment, runs)
        for setting in next_settings(lead, results, experiment.tuning):
            for seed in experiment.tuning:
                if seed not in results.get(setting, {}):
                    yield Job(name, lead.name, setting, seed, "valid")


def _reported(name: str, experiment: Experiment, runs: Sequence[Run]) -> Iterator[Job]:
    done = {(run["arm"], run["seed"]) for run in reported(experiment, runs)}
    for seed in experiment.seeds:
        for arm in experiment.arms:
            setting = setting_of(arm, experiment, runs)
            known = schedule_of(arm, experiment, runs) is not WAITING
            if setting is not None and known and (arm.name, seed) not in done:
                yield Job(name, arm.name, setting, seed, "test")


def waits_for(arm: Arm, experiment: Experiment, runs: Sequence[Run]) -> str | None:
    """The other arm that has to be run before this one can be; None: there is none."""
    lead = experiment.tuned(arm)
    if lead is not arm and setting_of(arm, experiment, runs) is None:
        return waits_for(lead, experiment, runs) or lead.name
    if arm.spends is None or schedule_of(arm, experiment, runs) is not WAITING:
        return None
    other = experiment.by_name[arm.spends]
    return None if _has_run(other, experiment, runs) else other.name


def _has_run(arm: Arm, experiment: Experiment, runs: Sequence[Run]) -> bool:
    return len(counted(arm, experiment, runs)) == len(experiment.seeds)


def never(arm: Arm, experiment: Experiment, runs: Sequence[Run]) -> str | None:
    """Why an arm is never run: low rank cannot cost as much as another arm, or that diverged."""
    lead, other = experiment.tuned(arm), experiment.by_name.get(arm.spends or "", arm)
    for one in (lead, other):
        if one is not arm and (why := never(one, experiment, runs)):
            return f"{one.name!r} is not, since {why}"
    if schedule_of(arm, experiment, runs) is not WAITING or waits_for(arm, experiment, runs):
        return None
    diverged = not _spent(other, experiment, runs)
    what = "diverged on all seeds" if diverged else "costs more than any low rank"
    return f"{other.name!r} {what}"


def setting_of(arm: Arm, experiment: Experiment, runs: Sequence[Run]) -> Setting | None:
    """What was chosen for the arms of its kind; None: it is not tuned yet."""
    lead = experiment.tuned(arm)
    results = _found(lead, experiment, runs)
    if next_settings(lead, results, experiment.tuning):
        return None
    return chosen(lead, results)


def at_an_end(arm: Arm, experiment: Experiment, runs: Sequence[Run]) -> bool:
    """Whether the rate of its kind is at an end of those tried: one beyond may be better."""
    lead = experiment.tuned(arm)
    return tuning.at_an_end(lead, _found(lead, experiment, runs))


def _found(arm: Arm, experiment: Experiment, runs: Sequence[Run]) -> Found:
    now = as_run(arm, experiment, runs, "valid")
    about = experiment.metric, experiment.higher, experiment.tuning
    return {} if now is None else found(now, runs, *about)


WAITING = object()
"""The schedule of an arm that waits for the runs of another."""
_MOST = 0.97  # of full rank's FLOPs; fixed low rank of more would be full rank


def schedule_of(
    arm: Arm, experiment: Experiment, runs: Sequence[Run]
) -> RankSchedule | object | None:
    """The schedule of an arm; of one that spends as much as another, fixed low rank of its mean.

    WAITING if that arm has seeds to run, or costs so much that no low rank does.
    """
    if arm.spends is None:
        return arm.schedule
    other = experiment.by_name[arm.spends]
    spent = _spent(other, experiment, runs)
    if not _has_run(other, experiment, runs) or not spent or fmean(spent) > _MOST:
        return WAITING
    return low_rank(budget=round(fmean(spent), 3))


def _spent(arm: Arm, experiment: Experiment, runs: Sequence[Run]) -> list[float]:
    """The FLOPs of the runs of an arm, but for those that diverged: they have few."""
    return [run["flops"] for run in counted(arm, experiment, runs) if run["result"]]
