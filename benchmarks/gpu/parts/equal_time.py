"""The loss at equal time: full rank, fixed low rank and decay on the same text.

Each run trains for the same seconds, in which cuts count. A schedule needs to know how many steps
that will be: the steps of each phase and a cut are timed before, the cut on one block of the model,
and it is multiplied by the number of blocks. The decay costs the FLOPs of the fixed low rank, step
for step; it makes as many of its eight cuts as take a quarter of the time at most.
"""

from __future__ import annotations

import statistics
import warnings
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch import nn

import dynarank as dr
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.forms import BLOCKS, LOW, blocks_of, decay_like, phases_of, rounded
from benchmarks.gpu.lm import Batches, Run, byte_gpt
from benchmarks.gpu.models import adamw, filled, gpt_loss, gpt_step
from benchmarks.gpu.text import Text, read_text
from dynarank.cost import ModelUse, trace
from dynarank.cost.stand_in import meta_copy
from dynarank.forms import Plan

__all__ = ["run"]

_RATE = 4e-4
_CUTS, _CUT_SHARE = 8, 0.25


@dataclass(frozen=True)
class Arm:
    """A run: ``form`` is full, low or decay, with ranks that are multiples of a number."""

    name: str
    form: str
    rate: float
    multiple: int = 1


def arms(multiple: int) -> list[Arm]:
    """The runs, the most valuable first."""
    first = [
        Arm("full rank", "full", _RATE),
        Arm("low rank 1/4", "low", _RATE),
        Arm(f"decay, ranks {multiple} k", "decay", _RATE, multiple),
    ]
    again = [replace(arm, name=f"{arm.name}, twice the rate", rate=2 * _RATE) for arm in first]
    return [*first, *again[1:], again[0], Arm("decay", "decay", _RATE, 1)]


@dataclass(frozen=True)
class Plans:
    """What is known before the runs: the trace, and the seconds of a run and of a cut."""

    use: ModelUse
    seconds: float
    cut: float
    outline: nn.Module
    phases: dict[int, list[float]] = field(default_factory=dict)


def run(bench: Bench) -> None:
    """Time steps and cuts, then train one arm after the other for the same seconds."""
    text = read_text(bench.data, bench.sizes.text)
    where = {"device": bench.device.torch}
    bench.record.part(bench.part, text=text.about())
    text = replace(text, train=text.train.to(**where), held_out=text.held_out.to(**where))
    model = byte_gpt(bench)
    outline, sample = meta_copy(model), next(Batches(bench, text.train))[0].to("meta")
    del model
    chosen = arms(bench.sizes.multiple)
    cut = _cut_seconds(bench, text)
    # The last one only if it fits.
    seconds = min(bench.deadline.left / (len(chosen) - 0.5), bench.sizes.longest)
    known = Plans(trace(outline, sample), seconds, cut, outline)
    bench.record.part(
        bench.part, seconds_a_run=seconds, cut_seconds_expected=cut, batch=[*sample.shape],
        width=bench.sizes.width, depth=bench.sizes.layers,
    )  # fmt: skip
    for arm in chosen:
        if bench.deadline.left < seconds:
            return
        with bench.attempt(arm.name):
            _train(bench, text, arm, known)
        bench.device.free()


def _train(bench: Bench, text: Text, arm: Arm, known: Plans) -> None:
    begun, schedule, steps = bench.device.now(), None, 1
    told: dict[str, Any] = {"rate": arm.rate, "form": arm.form}
    if arm.form == "decay":
        if known.cut > known.seconds:
            raise RuntimeError(f"a cut takes {known.cut:.1f} s, a run {known.seconds:.1f} s")
        cuts = max(1, min(_CUTS, int(_CUT_SHARE * known.seconds / known.cut)))
        schedule = decay_like(known.use, arm.multiple, cuts)
        if arm.multiple not in known.phases:
            found = _phase_seconds(bench, text, known, schedule, arm.multiple)
            known.phases[arm.multiple] = found
        mean = statistics.fmean(known.phases[arm.multiple])
        steps = max(10 * cuts, round((known.seconds - cuts * known.cut) / mean))
        told |= {"steps_expected": steps, "cuts_planned": cuts, "schedule": repr(schedule)}
    model = byte_gpt(bench)
    if arm.form == "low":
        dr.factorize(model, LOW.rank, layers=BLOCKS)
    bench.put(arm.name, **told, setup_seconds=bench.device.now() - begun)
    seconds = min(known.seconds, bench.deadline.left)
    one = Run(bench, text, model, known.use, arm.rate, seconds, schedule, steps)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        one.train(lambda results: bench.put(arm.name, **results))
    last = dr.current_plan(model)
    ranks = [getattr(last[path], "rank", None) for path in blocks_of(known.use)]
    bench.put(arm.name, ranks=ranks, warnings=sorted({str(one.message)[:300] for one in warned}))


def _cut_seconds(bench: Bench, text: Text) -> float:
    """The seconds of a cut of the whole model: the longer of two cuts of a block, times blocks."""
    batches, found = Batches(bench, text.train), list[float]()
    use = trace(byte_gpt(bench, layers=1), next(batches)[0])
    for _ in range(2):  # the first time libraries are loaded
        model, found = byte_gpt(bench, layers=1), []
        optimizer = adamw(model, _RATE)
        schedule = decay_like(use, bench.sizes.multiple, cuts=(4, 8))
        ranks = dr.RankScheduler(model, optimizer, schedule, total_steps=100, layers=BLOCKS)
        for x, y in islice(batches, 8):
            gpt_loss(model, x, y, bench.device).backward()
            optimizer.step()
            begun = bench.device.now()
            if ranks.step():
                found.append(bench.device.now() - begun)
            optimizer.zero_grad()
        ranks.close()
    return max(found) * bench.sizes.layers


def _phase_seconds(
    bench: Bench, text: Text, known: Plans, schedule: dr.schedules.Schedule, multiple: int
) -> list[float]:
    """The seconds of a step, for shares of the run that are equally long."""
    batches, found = Batches(bench, text.train), list[float]()
    for phase in phases_of(known.use, schedule):
        plan: Plan = rounded(phase.plan, multiple)
        step = gpt_step(filled(known.outline, plan, bench.device), batches, bench.device)
        bench.device.seconds(step, 2)
        seconds = statistics.median(bench.device.seconds(step, 4))
        found += [seconds] * phase.phase.steps
    return found
