"""Counts the FLOPs besides the training steps on a replay of a run, which does not train.

They follow from the times and forms of the changes, and from what the arm adds to the optimizer's
step. A schedule that decides by what it sees is replayed with training; one that changes at the
recorded steps without it is not, and the ranks are then those of an untrained network, which moved
the count by 0.003 of full rank's training at most where both were tried. Decompositions are not
counted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import dynarank as dr
from benchmarks.training.harness.arm import Setting
from benchmarks.training.harness.calibration import add, key
from benchmarks.training.harness.definition import defined, is_of
from benchmarks.training.harness.experiment import Experiment, get
from benchmarks.training.harness.narrow import flops
from benchmarks.training.harness.record import Run
from benchmarks.training.harness.spectra import digits
from benchmarks.training.harness.summary import Summaries
from benchmarks.training.harness.trial import Trial
from benchmarks.training.harness.witness import Witness
from benchmarks.training.problems.problem import Problem
from dynarank.schedules import schedule_from_data
from dynarank.schedules.base import RankSchedule
from dynarank.train.sources import DataError


def _baddbmm(_: Any, one: Any, other: Any, **__: Any) -> int:
    """The FLOPs of batched products of these shapes, (b, m, k) and (b, k, n)."""
    return 2 * math.prod(one) * other[-1]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The FLOPs of the two products of an attention of these shapes."""
    return sdpa_flop_count(query, key, value)


_ATEN = torch.ops.aten
UNKNOWN: Any = {
    _ATEN.baddbmm_: _baddbmm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
}
"""Operations that torch's counter does not count: in place, and attention on a CPU."""


class OtherRunError(Exception):
    """A replay is another run than the recorded one."""


class Blind(Witness):
    """A witness that notes when layers change, and computes nothing."""

    def _look(self, ranks: Any, paths: list[str]) -> dict[str, Any]:
        return {}


class Replay(Trial):
    """A run of which only the changes count.

    Attributes:
        counted: the FLOPs of calibrations, of BatchNorm too, of the products of changes, and of
            penalties and decays of products.
    """

    counted = 0

    def _ranks(self, schedule: RankSchedule) -> dr.RankScheduler:
        self.witness = Blind(self.seen["changes"])
        with self._counting():
            return super()._ranks(schedule)

    def replay(self, trained: bool) -> list[int]:
        """Go through all steps; at which of them layers changed."""
        assert self.ranks is not None
        for step in range(self.problem.steps):
            if trained:
                batch = self.problem.batch(self.seed, step)
                self.problem.backward(self.model, batch)
            with self._counting():
                self.optimizer.step()  # with what the arm adds to it; its own is element by element
                self.ranks.step()
            self.optimizer.zero_grad()
            self.lr.step()
        return _steps(self.seen)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
            yield
        self.counted += counter.get_total_flops()


def _steps(seen: Any) -> list[int]:
    return [change["step"] for change in seen["changes"]]


def share(experiment: Experiment, problem: Problem, run: Run) -> float:
    """The FLOPs of a run besides its training steps, relative to the training of full rank.

    Raises:
        OtherRunError: the replay changes layers at other steps than the run did.
    """
    steps: list[int] = []
    for trained in (False, True):  # what decides by what it sees needs the training
        about = experiment.by_name[run["arm"]], Setting(**run["setting"]), run["seed"]
        one = Replay(experiment, problem, *about, schedule_from_data(run["schedule"]))
        try:
            steps = one.replay(trained)
        finally:
            one.close()
        if steps == _steps(run):
            return digits(one.counted / (flops(problem) * problem.steps), 6)
    raise OtherRunError(
        f"{run['arm']}: its replay changed layers at steps {steps}, the record of seed "
        f"{run['seed']} at {_steps(run)}; replay it on the hardware of the record, "
        f"{run['hardware']}"
    )


def measure(names: Sequence[str], data: Path, results: Path) -> bool:
    """Replay what is not counted yet of these records, and write the file after each run.

    Returns:
        Whether all that is missing could be counted; what could not is named on stderr.
    """
    whole = True
    for name in names:
        if runs := missing(name, results):
            try:
                problem = get(name).load(data)
            except (OSError, ImportError, DataError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
                whole = False
                continue
            now = defined(problem)
            mine = [run for run in runs if is_of(run, now)]
            if len(mine) < len(runs):
                words = "are on record of what the problem was before: run it again"
                print(f"{name}: {len(runs) - len(mine)} arms {words}", file=sys.stderr, flush=True)
            counted = [_measure(name, problem, run, results) for run in mine]
            whole &= all(counted) and mine == runs
    return whole


def _measure(name: str, problem: Problem, run: Run, results: Path) -> bool:
    try:
        value = share(get(name), problem, run)
    except OtherRunError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return False
    add(name, run, value, results)
    print(f"{name}: {key(run)}: {value:.3f}", flush=True)
    return True


def missing(name: str, results: Path) -> list[Run]:
    """A run of each arm that is not in the file yet; those that change nothing cost nothing."""
    found = Summaries(name, folder=results)
    return [one.runs[0] for one in found.arms.values() if found.further(one.arm) is None]
