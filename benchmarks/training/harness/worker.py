"""A worker: takes missing runs, one after another, until the time is up or none is left.

Any number of workers may work at once, of one command or of several: each holds a lock on the run
it does, which the system releases if the worker is killed. The run's checkpoint stays, and the
next worker that takes the run goes on from there, unless the setting or the code is another now.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from fnmatch import fnmatch
from functools import cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from benchmarks.training.harness.arm import Arm
from benchmarks.training.harness.definition import changed, defined, of_one_problem
from benchmarks.training.harness.experiment import get
from benchmarks.training.harness.identity import code, commit, digest, fingerprint
from benchmarks.training.harness.jobs import Job, as_run, never, others, ready, waits_for
from benchmarks.training.harness.record import Run
from benchmarks.training.harness.spectra import digits
from benchmarks.training.harness.store import ROOT, Store
from benchmarks.training.harness.trial import Interrupted, Trial
from benchmarks.training.harness.tuning import as_data
from benchmarks.training.problems.problem import Problem
from dynarank.recording.host import hardware, started, versions
from dynarank.train.sources import DataError

_ABSENT = (OSError, ImportError, DataError)
"""What loading a problem raises without its data or a package."""
_POLL = 5.0
"""Seconds between two looks for runs, while others do all that is left."""


class Worker:
    """Runs what is missing of some experiments.

    Args:
        experiments: their names, the first first.
        data: the folder of the data sets.
        scratch: where locks and checkpoints of unfinished runs are.
        results: where the records are.
        deadline: when to stop, by ``time.monotonic``.
        arms: patterns of the arms to run; none: all.

    Attributes:
        left_out: experiments and arms that cannot be run: data or a package is not there, or a
            run raised an exception.

    Raises:
        OSError: the folder of the records cannot be written to.
    """

    def __init__(
        self,
        experiments: Sequence[str],
        data: Path,
        scratch: Path,
        results: Path = ROOT,
        deadline: float = float("inf"),
        arms: Sequence[str] = (),
    ) -> None:
        self.experiments, self.data = experiments, data
        self.results, self.deadline, self.arms = results, deadline, arms
        # Unfinished runs of other records are other runs.
        self.scratch = scratch / digest(str(results.resolve()).encode())
        self.left_out: set[tuple[str, ...]] = set()
        self.told: set[str] = set()
        self.problem = cache(lambda name: get(name).load(self.data))
        self.defined = cache(lambda name: defined(self.problem(name)))
        self.place = {"commit": commit(), "code": code(), "versions": versions()}
        self.scratch.mkdir(parents=True, exist_ok=True)
        results.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=results):  # what cannot be recorded is not run
            pass

    def work(self) -> int:
        """Run until nothing is left that can be run; how many runs were done."""
        done, parent = 0, os.getppid()
        # Without the process that started it, nobody would know that it works.
        while time.monotonic() < self.deadline and os.getppid() == parent:
            match self._next():
                case True:
                    done += 1
                case None:  # when an arm is tuned, its seeds are ready
                    time.sleep(_POLL)
                case _:
                    break
        if time.monotonic() < self.deadline:
            self._name_waiting()
        return done

    def _name_waiting(self) -> None:
        """Leave out by name what cannot be run before another arm, which has not been."""
        for name in (one for one in self.experiments if (one,) not in self.left_out):
            for arm in get(name).arms:
                if self._wanted(name, arm.name):
                    self._name(arm, name)

    def _name(self, arm: Arm, name: str) -> None:
        about = arm, get(name), self._runs(name)
        if why := never(*about):
            print(f"{name}: {arm.name} is never run: {why}", file=sys.stderr, flush=True)
        elif (other := waits_for(*about)) is not None:
            out = (name, other) in self.left_out
            fix = ", which is left out" if out else "; name that after --arms too"
            self._leave_out(f"it waits for {other!r}{fix}", name, arm.name)

    def _next(self) -> bool | None:
        """Take a run that nobody has, and do it.

        Returns:
            False if there is none or the time is up, None if others do all that is left.
        """
        others = False
        for name in self.experiments:
            for job in self._jobs(name):
                with self._claimed(job) as mine:
                    # Another worker may have finished it between the look and the claim.
                    if mine and job in self._missing(name):
                        return self._do(job)
                others = True
        return None if others else False

    def _jobs(self, name: str) -> list[Job]:
        """The missing runs of an experiment; none if it or its records are damaged."""
        if (name,) in self.left_out:
            return []
        try:
            self._tell_of_others(name)
            return self._missing(name)
        except OSError:
            raise
        except Exception as error:  # the other experiments can be run
            self._leave_out(error, name)
            return []

    def _missing(self, name: str) -> list[Job]:
        jobs = ready(name, get(name), self._runs(name), hardware(torch.device("cpu")))
        return [job for job in jobs if self._wanted(job.experiment, job.arm)]

    def _runs(self, name: str) -> list[Run]:
        """The recorded runs of the problem as it is now; of the last one if its data is absent."""
        runs = Store(name, self.results).runs(get(name).metric)
        with suppress(*_ABSENT):
            return of_one_problem(runs, self.defined(name))
        return of_one_problem(runs)

    def _tell_of_others(self, name: str) -> None:
        """Say once that runs are on record that do not count, of another problem or arm."""
        if name in self.told:
            return
        self.told.add(name)
        runs = Store(name, self.results).runs(get(name).metric)
        with suppress(*_ABSENT):  # without the data nobody knows
            if lost := len(runs) - len(of_one_problem(runs, self.defined(name))):
                names = changed(runs, self.defined(name)) or ["rate, steps or network"]
                tell_of(name, lost, "the problem", names)
        for arm, changes in others(get(name), self._runs(name)).items():
            tell_of(name, len(changes), repr(arm), dict.fromkeys(chain(*changes)))

    def _wanted(self, experiment: str, arm: str) -> bool:
        if {(experiment,), (experiment, arm)} & self.left_out:
            return False
        return not self.arms or any(fnmatch(arm, pattern) for pattern in self.arms)

    def _leave_out(self, error: Exception | str, *what: str) -> bool:
        self.left_out.add(what)
        print(f"{': '.join(what)} is left out: {error}", file=sys.stderr, flush=True)
        return True

    @contextmanager
    def _claimed(self, job: Job) -> Iterator[bool]:
        with (self.scratch / f"{job.key}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _do(self, job: Job) -> bool:
        try:
            problem = self.problem(job.experiment)
        except _ABSENT as error:
            return self._leave_out(error, job.experiment)
        try:
            return self._recorded(job, problem)
        except Interrupted as error:
            print(f"{job.experiment}: {error}", file=sys.stderr, flush=True)
            return False
        except ImportError as error:
            return self._leave_out(error, job.experiment, job.arm)
        except OSError:  # no record or checkpoint can be written, of the other arms neither
            raise
        except Exception as error:  # the other arms can be run
            traceback.print_exc()
            return self._leave_out(error, job.experiment, job.arm)

    def _recorded(self, job: Job, problem: Problem) -> bool:
        """Run what is asked for, and record it."""
        experiment, begun = get(job.experiment), started()
        runs = self._runs(job.experiment)
        arm = as_run(experiment.by_name[job.arm], experiment, runs, job.part)
        assert arm is not None, f"{job} waits"
        if round(arm.length * problem.steps) < 1:
            why = f"{arm.length:g} of {problem.steps} steps is no step"
            return self._leave_out(f"{why}; train it longer", job.experiment, job.arm)
        what = described(job, problem, arm) | {"problem": self.defined(job.experiment)}
        folder = self.scratch / f"{job.key}.{fingerprint(what, self.place['versions'])}"
        about = problem, arm, job.setting, job.seed, arm.schedule, job.part == "test"
        with closing(Trial(experiment, *about)) as trial:
            trial.run(folder, self.deadline)
            result = trial.result(job.part)
        if job in self._missing(job.experiment):  # else a command of another scratch did it
            record = {**what, **result, **self._environment(begun)}
            Store(job.experiment, self.results).append(record)
        for old in self.scratch.glob(f"{job.key}.*"):
            shutil.rmtree(old, ignore_errors=True)
        show(job, problem, result)
        return True

    def _environment(self, begun: str) -> dict[str, Any]:
        load = digits(os.getloadavg()[0], 2)
        device = hardware(torch.device("cpu"))
        return {"hardware": device, "load": load, "started": begun, **self.place}


def tell_of(name: str, runs: int, what: str, changes: Iterable[str]) -> None:
    """Say that runs on record do not count, since this has changed."""
    words = f"{runs} runs on record do not count: {what} has changed since"
    print(f"{name}: {words} ({', '.join(changes)})", file=sys.stderr, flush=True)


def described(job: Job, problem: Problem, arm: Arm) -> dict[str, Any]:
    """What is run."""
    return {
        "experiment": job.experiment, "arm": job.arm, "seed": job.seed, "part": job.part,
        "setting": as_data(job.setting), "rate": job.setting.rate * problem.rate,
        **arm.options,
        "precision": "bf16 autocast" if problem.bf16 else "fp32",
    }  # fmt: skip


def show(job: Job, problem: Problem, result: dict[str, Any]) -> None:
    """Print a line about a run that has ended."""
    value = result["result"].get(problem.metric, float("nan"))
    setting = " ".join(map(str, as_data(job.setting).values()))
    what = f"{job.experiment}: {job.arm}, seed {job.seed} ({job.part}), {setting}"
    cost = f"FLOPs {result['flops']:.3f}, {result['cpu_seconds']:.1f} s"
    print(f"{what}: {problem.metric} {value:.4g}, {cost}", flush=True)
