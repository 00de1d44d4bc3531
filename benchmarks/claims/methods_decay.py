"""Decay: the rule, and the runs on convolutions."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.training.harness.summary import FULL
from dynarank.schedules import rank_decay

from .experiments import BETTER, DECAY, GPT, LONG, LONG_DECAY, MLP, NARROW, found, verb
from .methods_shared import row, spread
from .records import mean, read_lines, select, values
from .words import NUMBERS, says

PAGE = "docs/methods/decay.md"
SETTINGS = (
    "(about 300 short runs, n = 1 to 3:",
    "to a decay of 0.65 of",
    "A ResNet-14 on 10,000 small CIFAR-10 images",
    "at 0.3 of the FLOPs one cut at a tenth of the run, `decay(total=..., cuts=[0.1])`,",
)


def claims() -> Iterator[str]:
    """Yield the figures as the page has them."""
    yield _rule()
    yield from _compared()
    yield from _convolutions()


def _rule() -> str:
    last = f"{rank_decay.LAST_PER_SQUARE:.0f} b² of the run, at most at {rank_decay.LATEST:.0%}"
    return f"n is {rank_decay.CUTS}, the last cut comes at {last}"


def _compared() -> Iterator[str]:
    half, others = found(GPT).decay("0.5"), ("full first 0.5", "shorter, 0.5", "narrower, 0.5")
    better = verb(GPT, half, "fixed 0.5 FLOPs")
    assert {verb(GPT, half, other) for other in others} == {better}
    yield f"a decay {better} fixed low rank, one early cut and shorter training of its FLOPs"
    steps = {name: found(name).arms[FULL].runs[0]["steps"] for name in (GPT, LONG)}
    yield says(
        f"In a run of {NUMBERS[steps[LONG] // steps[GPT]]} times the steps the narrower network is "
        "better than the decay.",
        verb(LONG, NARROW, LONG_DECAY) == BETTER,
    )
    half = found(MLP).decay("0.5")
    for arm, low in {half: "fixed 0.5 FLOPs", DECAY: "fixed 0.65 FLOPs"}.items():
        assert verb(MLP, arm, low) == "is better than"
    yield f"of half of the FLOPs or more {verb(MLP, half, 'fixed 0.5 FLOPs')} fixed low rank"
    yield f"but {verb(MLP, half, 'narrower, 0.5')} a narrower network"
    one = verb(MLP, "full first 0.3", found(MLP).decay("0.3"))
    yield f", {one} eight."
    many, few = (found(GPT).further(arm) for arm in ("decay 0.65", DECAY))
    yield f"on 32 batches each add {many:.2f} of full rank's FLOPs to a decay of"
    yield f"on 8 batches, the default, {few:.2f}, and the two are"
    assert verb(GPT, "decay 0.65", DECAY) == "is not distinguishable from"


def _convolutions() -> Iterator[str]:
    runs = read_lines("training/results/2026-11-28-convolutions/runs.jsonl")
    for name, arm in {
        "fixed low rank, uniform": "fixed 0.5",
        "decay, four cuts from 3 to 60% of the run": "decay 0.5",
        "fixed low rank, weight decay of the product": "fixed, product decay 0.5",
    }.items():
        one = select(runs, arm=arm)
        costs = (f"{mean(values(one, key)):.3f}" for key in ("flops", "end_flops"))
        yield row(name, *costs, spread(values(one, "accuracy"), 2))
    full = values(runs, "accuracy", arm="full rank")
    yield f"Full rank reached {mean(full):.1f}% (one seed)"
