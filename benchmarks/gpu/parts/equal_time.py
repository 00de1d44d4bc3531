"""The loss at equal time: full rank, fixed low rank and decay on the same text.

Each run trains for the same seconds, in which cuts count. A schedule needs to know how many steps
that will be: the steps of each phase and a cut are timed before, the cut on one block of the model,
and it is multiplied by the number of blocks. The decay costs the FLOPs of the fixed low rank, step
for step; it makes as many of its eight cuts as take a third of the time at most.
"""

from __future__ import annotations

import statistics
import warnings
from dataclasses import dataclass, replace
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

__all__ = ["run"]

_RATE = 4e-4
_CUTS, _CUT_SHARE = 8, 1 / 3
_BEFORE = 0.1  # of the part's time, to make models, and to time steps and cuts


@dataclass(frozen=True)
class Arm:
    """A run: ``form`` is full, low or decay."""

    name: str
    form: str
    rate: float


@dataclass
class Known:
    """What all runs share, and what is timed before the first decay.

    Args:
        text: the text, on the device.
        outline: the model at full rank, without values.
        use: its trace.
        seconds: of a run.
        cut: the seconds of a cut; None: not timed yet.
        step: the mean seconds of a step of the decay; None: not timed yet.
    """

    text: Text
    outline: nn.Module
    use: ModelUse
    seconds: float
    cut: float | None = None
    step: float | None = None


def run(bench: Bench) -> None:
    """Train one arm after the other for the same seconds."""
    chosen = _arms(bench.sizes.multiple)
    known = _known(bench, len(chosen))
    for i, arm in enumerate(chosen):
        if bench.deadline.left < known.seconds:
            bench.record.part(bench.part, left_out=[one.name for one in chosen[i:]])
            return
        with bench.attempt(arm.name):
            _train(bench, arm, known)
        bench.device.free()


def _arms(multiple: int) -> list[Arm]:
    """The runs, the most valuable first."""
    full, low = Arm("full rank", "full", _RATE), Arm("low rank 1/4", "low", _RATE)
    decay = Arm(f"decay, ranks {multiple} k", "decay", _RATE)
    again = [
        replace(arm, name=f"{arm.name}, twice the rate", rate=2 * arm.rate)
        for arm in (low, decay, full)
    ]
    return [full, low, decay, *again]


def _seconds(bench: Bench, arms: int) -> float:
    """The seconds of each run."""
    return min(bench.deadline.left * (1 - _BEFORE) / arms, bench.sizes.longest)


def _known(bench: Bench, arms: int) -> Known:
    """Read the text, and divide the time."""
    text = read_text(bench.data, bench.sizes.text)
    about = text.about()
    text = text.to(bench.device.torch)
    outline, sample = meta_copy(byte_gpt(bench)), next(Batches(bench, text.train))[0].to("meta")
    seconds = _seconds(bench, arms)
    shape = {"width": bench.sizes.width, "depth": bench.sizes.layers, "batch": [*sample.shape]}
    bench.record.part(bench.part, text=about, seconds_a_run=seconds, **shape)
    return Known(text, outline, trace(outline, sample), seconds)


def _train(bench: Bench, arm: Arm, known: Known) -> None:
    begun = bench.device.now()
    schedule, steps, told = _scheduled(bench, known) if arm.form == "decay" else (None, 1, {})
    model = byte_gpt(bench)
    if arm.form == "low":
        dr.factorize(model, LOW.rank, layers=BLOCKS)
    before = bench.device.now() - begun
    bench.put(arm.name, form=arm.form, rate=arm.rate, **told, seconds_before=before)
    seconds = min(known.seconds, bench.deadline.left)
    one = Run(bench, known.text, model, known.use, arm.rate, seconds, schedule, steps)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        one.train(lambda results: bench.put(arm.name, **results))
    last = dr.current_plan(model)
    ranks = [getattr(last[path], "rank", None) for path in blocks_of(known.use)]
    said = sorted({str(one.message)[:300] for one in warned})
    bench.put(arm.name, ranks_at_the_end=ranks, warnings=said)


def _scheduled(bench: Bench, known: Known) -> tuple[dr.schedules.Schedule, int, dict[str, Any]]:
    """The decay, the steps that it is expected to do, and what to record of it.

    Raises:
        RuntimeError: a cut takes longer than a run.
    """
    if known.cut is None:
        known.cut = _cut_seconds(bench, known.text) * bench.sizes.layers
        bench.record.part(bench.part, cut_seconds_expected=known.cut)
    if known.cut > known.seconds * bench.sizes.patience:
        raise RuntimeError(f"a cut takes {known.cut:.1f} s, a run {known.seconds:.1f} s")
    cuts = max(1, min(_CUTS, int(_CUT_SHARE * known.seconds / known.cut)))
    schedule = decay_like(known.use, bench.sizes.multiple, cuts)
    if known.step is None:
        known.step = _step_seconds(bench, known, schedule)
    left = known.seconds - cuts * known.cut
    steps = max(10 * cuts, round(left / known.step))
    return (
        schedule,
        steps,
        {"cuts_planned": cuts, "steps_expected": steps, "schedule": repr(schedule)},
    )


def _cut_seconds(bench: Bench, text: Text) -> float:
    """The seconds of a cut of a model with one block: the longer of two cuts, after a warm-up."""
    batches, found = Batches(bench, text.train), list[float]()
    use = trace(byte_gpt(bench, layers=1), next(batches)[0])
    schedule = decay_like(use, bench.sizes.multiple, cuts=(4, 8))
    for _ in range(2):  # the first time libraries are loaded
        model, found = byte_gpt(bench, layers=1), []
        optimizer = adamw(model, _RATE)
        ranks = dr.RankScheduler(model, optimizer, schedule, total_steps=100, layers=BLOCKS)
        for x, y in islice(batches, 8):
            gpt_loss(model, x, y, bench.device).backward()
            optimizer.step()
            begun = bench.device.now()
            if ranks.step():
                found.append(bench.device.now() - begun)
            optimizer.zero_grad()
        ranks.close()
    return max(found)


def _step_seconds(bench: Bench, known: Known, schedule: dr.schedules.Schedule) -> float:
    """The mean seconds of a step, of which each phase has its share; budgets have uniform ranks."""
    batches, total, number = Batches(bench, known.text.train), 0.0, 0
    for phase in phases_of(known.use, schedule):
        plan = rounded(phase.plan, bench.sizes.multiple)
        step = gpt_step(filled(known.outline, plan, bench.device), batches, bench.device)
        bench.device.times(step, 2)
        total += statistics.median(bench.device.times(step, 4).device) * phase.phase.steps
        number += phase.phase.steps
    return total / number
