"""One run: an arm of an experiment on a seed, with its costs and what is seen on the way.

Seconds are those of training steps and changes of form; looking (validation, spectra) is not in
them, but for the hooks that measure the memory of the first step of a phase. FLOPs are those of the
steps that ran, of the whole model; calibration and cuts are in the seconds, not in the FLOPs, nor
is what an optimizer computes.
"""

from __future__ import annotations

import copy
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import dynarank as dr
from benchmarks.training.harness.arm import Arm, Setting
from benchmarks.training.harness.energy import counters, joules
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.harness.extras import add_penalty, decay_products
from benchmarks.training.harness.narrow import flops, width_for
from benchmarks.training.harness.pace import Pace
from benchmarks.training.harness.peers import own_bytes
from benchmarks.training.harness.spectra import digits, readings, spectra
from benchmarks.training.harness.witness import Witness
from benchmarks.training.problems.problem import Part, Problem
from dynarank.cost import trace
from dynarank.cost.memory import probe_memory
from dynarank.factors.live_sites import LiveSites
from dynarank.schedules.base import RankSchedule
from dynarank.surgery.sites import Site
from dynarank.train.ledger import Ledger

_CPU = torch.device("cpu")
SAVE_EVERY = 60.0
"""Seconds of a run between two checkpoints."""


class Interrupted(Exception):
    """The time was up; the run is saved and goes on when it is asked for again."""


class Trial:
    """A run that can be left and taken up again, bit by bit the same.

    Args:
        experiment: how often it is looked at.
        problem: the problem, with its data.
        arm: how to train.
        setting: what was tuned.
        seed: of the initial weights and batches.
        schedule: the arm's schedule, or the fixed low rank that it stands for; None: none.
        reported: whether the pace of full rank is timed beside it.
    """

    def __init__(
        self,
        experiment: Experiment,
        problem: Problem,
        arm: Arm,
        setting: Setting,
        seed: int,
        schedule: RankSchedule | None,
        reported: bool = False,
    ) -> None:
        self.experiment, self.whole, self.arm = experiment, problem.steps, arm
        self.problem = problem = shortened(problem, arm.length)
        self.setting, self.seed, self.schedule = setting, seed, schedule
        self.seen: dict[str, Any] = {
            "step": 0, "cpu": 0.0, "wall": 0.0, "joules": 0.0, "loss": 0.0, "losses": 0,
            "memory": 0, "end_memory": 0, "points": [], "changes": [], "paces": [],
        }  # fmt: skip
        self.witness = Witness(self.seen["changes"])
        self.pace = Pace(problem, seed, experiment.points) if reported else None
        self.model = self._model()
        self.use = trace(self.model, problem.batch(seed, 0)[0])
        self.optimizer = self._optimizer()
        self.lr = LambdaLR(self.optimizer, problem.factor)
        with self._timed():
            self.ranks = None if schedule is None else self._ranks(schedule)
        self.ledger = Ledger(self.use, dr.current_plan(self.model))
        self.probe = True  # whether the memory of the next step is measured

    def _model(self) -> nn.Module:
        width = 1.0 if self.arm.narrow is None else width_for(self.problem, self.arm.narrow)
        model = self.problem.model(self.seed, width)
        return self.arm.prepare(model, self.problem, self.seed) if self.arm.prepare else model

    def _optimizer(self) -> torch.optim.Optimizer:
        rate = self.setting.rate * self.problem.rate
        if self.arm.optimizer is not None:
            return self.arm.optimizer(self.problem, self.model, rate)
        optimizer = self.problem.optimizer(self.model, rate)
        add_penalty(self.model, optimizer, self.problem, self.arm, self.setting.coefficient)
        if self.setting.decay == "product":
            decay_products(self.model, optimizer, self.problem)
        return optimizer

    def _ranks(self, schedule: RankSchedule) -> dr.RankScheduler:
        norms = {s.path: s.effective().norm().detach() for s in self._sites()}
        problem, arm = self.problem, self.arm
        ranks = dr.RankScheduler(
            self.model, self.optimizer, schedule, problem.steps, layers=problem.layers,
            lr_scheduler=self.lr, lr_every=1, moments=arm.moments,
            batches=(lambda: problem.inputs(self.seed, arm.batches)) if arm.by_data else None,
            callbacks=[self.witness, dr.LRRewarmup(arm.rewarmup)],
        )  # fmt: skip
        if self.setting.start == "norm":
            for site in self._sites():
                scale_to(site, norms[site.path])
        return ranks

    def _sites(self) -> list[Site]:
        return LiveSites(self.model, self.problem.layers)()

    def run(self, folder: Path, deadline: float = math.inf) -> None:
        """Train to the end, from the checkpoint in the folder if there is one that is whole.

        Raises:
            Interrupted: the deadline (of ``time.monotonic``) came first; a checkpoint is saved.
        """
        if folder.exists():
            try:
                self._load(folder)
            except ValueError as error:  # it is damaged, and has changed nothing
                print(f"{self.name} begins again: {error}", file=sys.stderr, flush=True)
                shutil.rmtree(folder)
        saved = time.monotonic()
        while self.seen["step"] < self.problem.steps and math.isfinite(self.seen["loss"]):
            self.step()
            now = time.monotonic()
            if self.seen["step"] < self.problem.steps and now > min(deadline, saved + SAVE_EVERY):
                self._save(folder)
                saved = now
                if now > deadline:
                    raise Interrupted(f"{self.name} {self._left(folder)}")

    @property
    def name(self) -> str:
        """Arm and seed."""
        return f"{self.arm.name}, seed {self.seed}"

    def _left(self, folder: Path) -> str:
        """Where a run is left whose time is up."""
        at = f"is left at step {self.seen['step']} of {self.problem.steps}"
        if folder.exists():
            return f"{at} and goes on from there"
        return f"{at} and begins again: its optimizer is not saved; give it more time"

    def step(self) -> None:
        """One training step, and a look at the model where one is due."""
        batch = self.problem.batch(self.seed, self.seen["step"])
        measured = probe_memory(self.model, [self.optimizer], _CPU) if self.probe else nullcontext()
        with self._timed():
            with measured as memory:
                loss = self.problem.backward(self.model, batch)
                self.optimizer.step()
            changes = self.ranks.step() if self.ranks is not None else []
            self.optimizer.zero_grad()
            self.lr.step()
        if memory is not None:
            used = memory.peak_bytes + own_bytes(self.optimizer)
            self.seen["end_memory"], self.seen["memory"] = used, max(self.seen["memory"], used)
        self._count(loss.item())
        if changes:
            self.ledger.turn(dr.current_plan(self.model))
        self.probe = bool(changes)
        self._look()

    def _count(self, loss: float) -> None:
        self.ledger.step()
        self.seen["step"] += 1
        self.seen["loss"] += loss
        self.seen["losses"] += 1

    def _look(self) -> None:
        """At each of the experiment's points: validation, costs so far, spectra."""
        step, steps, points = self.seen["step"], self.problem.steps, self.experiment.points
        if step * points // steps == (step - 1) * points // steps:
            return
        point = {
            "step": step,
            "train_loss": digits(self.seen["loss"] / self.seen["losses"], 6),
            "valid": rounded(self.problem.test(self.model, "valid")),
            "flops": digits(self.relative_flops, 6),
            "cpu_seconds": digits(self.seen["cpu"]),
            "parameters": self.ledger.trainable,
            "spectra": spectra(self.model, self.problem.layers),
        }
        self.seen["points"].append(point)
        self.seen["paces"] += [] if self.pace is None else self.pace.measure()
        self.seen["loss"] = self.seen["losses"] = 0

    @property
    def relative_flops(self) -> float:
        """The training FLOPs so far, relative to the whole run of the full-rank network."""
        return self.ledger.training_flops / (flops(self.problem) * self.whole)

    def result(self, part: Part) -> dict[str, Any]:
        """What is recorded: the result on this part of the data, costs, and what was seen."""
        seen, ledger, steps = self.seen, self.ledger, self.problem.steps
        found = rounded(self.problem.test(self.model, part)) if seen["step"] == steps else {}
        good = all(map(math.isfinite, found.values()))
        if part == "valid":  # of a tuning run, nothing but the result is used
            seen = {**seen, "points": [], "changes": []}
        return {
            "steps": steps, "result": found if good else {},
            "flops": self.relative_flops, "training_flops": ledger.training_flops,
            "end_flops": ledger.flops.training / flops(self.problem),
            "parameters_mean": ledger.trainable_mean, "parameters_peak": ledger.trainable_peak,
            "parameters_end": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "memory_peak": seen["memory"], "memory_end": seen["end_memory"],
            "cpu_seconds": seen["cpu"], "full_rank_seconds": self._full_rank_seconds(),
            "wall_seconds": seen["wall"], "joules": seen["joules"],
            "points": seen["points"], "changes": seen["changes"],
            **self._last_spectra(),
        }  # fmt: skip

    def _full_rank_seconds(self) -> float | None:
        """The CPU seconds of full rank at the pace that was timed beside the run."""
        paces = self.seen["paces"]
        return digits(self.whole * median(paces), 6) if paces else None

    def _last_spectra(self) -> dict[str, Any]:
        """The largest possible rank of each layer, and the singular values if they are kept."""
        keep = self.experiment.values and self.seed == self.experiment.seeds[0]
        found = readings(self.model, self.problem.layers, 4096 if keep else 0)
        values = {path: [digits(v) for v in one.values] for path, one in found.items()}
        ranks = {path: one.full_rank for path, one in found.items()}
        return {"full_ranks": ranks, **({"values": values} if keep else {})}

    def close(self) -> None:
        """Give back what the scheduler holds."""
        if self.ranks is not None:
            self.ranks.close()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time of the block, without that of the witness, and its energy."""
        energy, cpu, wall = counters(), time.process_time(), time.perf_counter()
        looked = self.witness.seconds
        yield
        looked = self.witness.seconds - looked
        self.seen["cpu"] += time.process_time() - cpu - looked
        self.seen["wall"] += time.perf_counter() - wall - looked
        used = joules(energy, counters())
        self.seen["joules"] = None if used is None else self.seen["joules"] + used

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.lr,
            **({} if self.ranks is None else {"ranks": self.ranks}),
        }  # fmt: skip

    def _save(self, folder: Path) -> None:
        if self.arm.optimizer is not None:  # that of another project may hold what cannot be saved
            return
        extra = {"seen": self.seen, "ledger": self.ledger.state_dict(), "probe": self.probe}
        dr.save(folder, **self._parts(), extra=extra)

    def _load(self, folder: Path) -> None:
        extra = dr.load(folder, **self._parts())
        self.seen, self.probe = extra["seen"], extra["probe"]
        self.witness.changes = self.seen["changes"]
        self.ledger.turn(dr.current_plan(self.model))
        self.ledger.load_state_dict(extra["ledger"])


def shortened(problem: Problem, length: float) -> Problem:
    """The problem with a share of its steps."""
    if length == 1.0:
        return problem
    short = copy.copy(problem)
    short.steps = round(length * problem.steps)
    return short


@torch.no_grad()
def scale_to(site: Site, norm: Tensor) -> None:
    """Scale the factors of a low-rank weight such that it has this norm."""
    factors = site.factors()
    scale = (norm / site.effective().norm()) ** (1 / len(factors))
    for factor in factors:
        factor.mul_(scale)


def rounded(results: dict[str, float]) -> dict[str, float]:
    """The results to six digits."""
    return {name: digits(value, 6) for name, value in results.items()}
