"""What an experiment is: a problem, its arms and seeds."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import benchmarks.training.experiments as folder
from benchmarks.training.harness.arm import Arm
from benchmarks.training.problems.problem import Problem

FULL = "full rank"


@dataclass(frozen=True)
class Experiment:
    """Arms that train the networks of one problem.

    Args:
        title: what the problem is, for a heading.
        problem: a function from the folder of the data to the problem.
        arms: the arms, full rank first.
        seeds: the seeds that are reported.
        tuning: the seeds on which arms are tuned; never reported.
        tuning_length: the share of the steps for which a run trains that tunes.
        points: at how many times of a run it is looked at.
        note: what a reader of the table has to know.
        label: the problem in a few words, for a row of a table; none: the title up to a comma.
        metric: the result, as the problem names it.
        higher: whether a larger result is better.
        values: whether the singular values of the final weights are kept, of the first seed.
    """

    title: str
    problem: Callable[[Path], Problem]
    arms: Sequence[Arm]
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    tuning: Sequence[int] = (100,)
    tuning_length: float = 1.0
    points: int = 8
    note: str = ""
    label: str = ""
    metric: str = "accuracy"
    higher: bool = True
    values: bool = False

    def __post_init__(self) -> None:
        if both := set(self.seeds) & set(self.tuning):
            raise ValueError(f"seeds {sorted(both)} are reported and tuned on; they must differ")
        names = [arm.name for arm in self.arms]
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise ValueError(f"two arms are named {twice[0]!r}; an arm's name is its own")
        if FULL not in names:
            fix = "begin the arms with *arms.full_rank()"
            raise ValueError(f"no arm is named {FULL!r}, to which all is relative; {fix}")
        for place, arm in enumerate(self.arms):
            if arm.spends is not None and arm.spends not in names[:place]:
                raise ValueError(
                    f"{arm.name!r} spends what {arm.spends!r} does; put that before it"
                )

    @property
    def short(self) -> str:
        """The problem in a few words."""
        return self.label or self.title.partition(",")[0]

    def load(self, data: Path) -> Problem:
        """The problem, with its data.

        Raises:
            ValueError: it reports something else than the experiment.
        """
        problem = self.problem(data)
        if (problem.metric, problem.higher) != (self.metric, self.higher):
            raise ValueError(
                f"{self.title!r} reports {self.metric!r}, its problem {problem.metric!r}; "
                f"larger is better: {self.higher}, {problem.higher}"
            )
        return problem

    @cached_property
    def by_name(self) -> dict[str, Arm]:
        """The arms by name."""
        return {arm.name: arm for arm in self.arms}

    def tuned(self, arm: Arm) -> Arm:
        """The arm of its kind on which this arm's setting is chosen."""
        return next(other for other in self.arms if other.kind == arm.kind)


class ExperimentError(Exception):
    """The file of an experiment cannot be used."""


@cache
def names() -> tuple[str, ...]:
    """The names of all experiments: the files of ``benchmarks/training/experiments``."""
    return tuple(found.name for found in pkgutil.iter_modules(folder.__path__))


@cache
def get(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        ValueError: there is none.
        ExperimentError: its file raises.
    """
    if name not in names():
        raise ValueError(f"no experiment is named {name!r}; there are {', '.join(names())}")
    module = f"{folder.__name__}.{name}"
    try:
        return importlib.import_module(module).EXPERIMENT
    except Exception as error:
        path = f"{module.replace('.', '/')}.py"
        raise ExperimentError(f"{path}: {type(error).__name__}: {error}") from error


def broken(chosen: Iterable[str]) -> dict[str, str]:
    """By name, why the files of some experiments cannot be used."""
    found: dict[str, str] = {}
    for name in chosen:
        try:
            get(name)
        except ExperimentError as error:
            found[name] = str(error)
    return found
