"""README: the demo's table and what argues against a schedule."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.training.harness.summary import ALL_FLOPS, FULL
from dynarank.records import SummaryRecord
from dynarank.report.comparison import compare_pairs

from .evidence import (
    BYTE,
    DECAY,
    DEEPER,
    GPT,
    HALF_FIXED,
    LARGER,
    MEDIUM,
    MLP,
    RESNET,
    SST,
    VIT,
    WIDE,
    WRN,
    behind,
    compared,
    found,
    led,
    rate,
    share,
    steps_of_tuning,
    unclipped,
    verb,
)
from .records import deviation, mean, only, read_json, read_runs
from .versions import python

PAGE = "README.md"
DEMO = "training/results/2026-11-28-demo"
SETTINGS = (
    "Apache-2.0",
    "the GPT of 10 million parameters",
    "by the 95% interval of one difference",
)


def claims() -> Iterator[str]:
    """Yield the figures in the order of the page."""
    yield from gains()
    for schedule in ("full-rank", "low-rank", "decay"):
        runs = summaries(DEMO, schedule)
        yield f"test accuracy, % (n = {len(runs)})"
        yield (
            f"| {schedule.replace('-', ' ')} | {spread(runs)} | {flops(runs):.3f}x "
            f"| {runs[0].trainable_parameters_peak:,} |"
        )
    yield from demo_tests()
    yield f"With Python {python()} or newer"
    small = "fixed 1/16"
    yield (
        f"low rank at 1/16 of the rank {verb(WIDE, small)} full rank, for "
        f"{share(WIDE, small, ALL_FLOPS)} of the FLOPs and {share(WIDE, small, 'cpu_seconds')} of "
        f"the CPU seconds ([n = {found(WIDE).arms[small].n}]"
    )
    rates = {name: (rate(name, arm), rate(name, FULL)) for name, arm in _LOW.items()}
    assert {(low > full) - (low < full) for low, full in rates.values()} == {-1, 0, 1}
    layers = read_json("layers/results/2026-11-24-cpu/layers.json")["rows"]
    conv = only(layers, layer="conv 3x3, 16 channels, 32x32, batch 32", share="1/8")
    times = conv["ms"]
    yield f"convolution with {conv['flop_ratio']:.1f} times fewer FLOPs"
    speedup = times["full-rank"]["median"] / times["factored"]["median"]
    yield f"is {speedup:.2f} times as fast"


def gains() -> Iterator[str]:
    """Yield what the table comes to."""
    decay, low, narrow = DECAY, "fixed 0.65 FLOPs", "narrower, 0.65"
    assert verb(GPT, decay, narrow) == verb(GPT, decay, low)
    yield (
        f"at {share(GPT, decay)} of the training FLOPs, it {verb(GPT, decay, low)} fixed low rank "
        f"of the same FLOPs by {behind(GPT, low, decay).replace('s.e.', 's.e., standard error,')}, "
        f"than a narrower network by {behind(GPT, narrow, decay)}, and {verb(GPT, decay)} full "
        f"rank, behind which it is by {behind(GPT, decay)}."
    )
    smaller = found(GPT).decay("0.5")
    gain = found(GPT).difference(smaller, narrow)
    assert gain is not None and gain.low > 0
    yield (
        f"The narrower one has {share(GPT, narrow, ALL_FLOPS)}x of all FLOPs; a decay at "
        f"{share(GPT, smaller, ALL_FLOPS)}x {verb(GPT, smaller, narrow)} it by {gain.mean:.3f} "
        f"(interval {gain.low:.3f} to {gain.high:.3f})."
    )
    pairs = [(MEDIUM, decay, narrow), (MEDIUM, decay, low)]
    pairs += [(BYTE, "decay 0.65", other) for other in (narrow, low, FULL)]
    (better,) = {verb(*pair) for pair in pairs}
    yield f"a decay {better} both too, and on the byte GPT than full rank, by"
    half = "decay 0.5"
    yield (
        f"by {behind(BYTE, FULL, 'decay 0.65')}; there a decay at {share(BYTE, half)} "
        f"{verb(BYTE, half)} full rank."
    )
    full, behind_full = (f"{mean(unclipped(arm)):.3f}" for arm in (FULL, "decay 0.65"))
    yield f"in which a decay was behind full rank, with {behind_full} against {full}."
    assert {rate(MEDIUM, decay) / rate(MEDIUM, arm) for arm in (FULL, low, narrow)} == {2}
    yield f"the learning rate of the others; one seed chose it, in {steps_of_tuning()} steps."
    steps = sorted(found(name).arms[FULL].runs[0]["steps"] for name in (GPT, BYTE, MEDIUM))
    yield f"short runs, of {steps[0]} to {steps[-1]} steps"
    gain = behind(MLP, low, decay)
    yield (
        f"on that of width 256 it {verb(MLP, decay, low)} fixed low rank by {gain} points "
        f"({share(MLP, low, ALL_FLOPS)}x is with the products of its weight decay)"
    )
    fifth = "fixed 0.2 FLOPs"
    costs = {arm: share(WIDE, arm, ALL_FLOPS) for arm in (fifth, "decay 0.2", "decay 0.3")}
    others = {FULL: "full rank", "narrower, 0.3": "a narrower network"}
    others |= {arm: f"a decay at {cost}" for arm, cost in costs.items() if arm != fifth}
    yield (
        f"on one of width 1024 fixed low rank, at {costs[fifth]} of all FLOPs, "
        f"{compared(WIDE, fifth, others)}."
    )
    for name in (DEEPER, LARGER, WRN):
        assert verb(name, found(name).decay("0.65"), low) == verb(RESNET, decay, low)
    yield f"on the ResNets it {verb(RESNET, decay, low)} fixed low rank, and on the"
    settled = {WRN: "on the WRN-16-4", VIT: "on the ViT it is not settled:"}
    for name, words in settled.items():
        decay = found(name).decay("0.65")
        better = verb(name, narrow, decay).removesuffix(" than")
        yield f"{words} a narrower network {better} by {behind(name, decay, narrow)} points"
    yield f"runs of half the length, in which the decay led full rank by {led():.2f};"
    yield f"SST-2 fixed low rank at {share(SST, HALF_FIXED)} {verb(SST, HALF_FIXED)} full rank."


_LOW = {name: "fixed 0.65 FLOPs" for name in (GPT, BYTE, MEDIUM, MLP, RESNET, DEEPER, LARGER, VIT)}
_LOW |= {WIDE: "fixed 0.3 FLOPs"}


def summaries(folder: str, schedule: str) -> list[SummaryRecord]:
    """Return what the finished runs of a schedule came to."""
    runs = [run for run in read_runs(folder) if run.header.schedule == schedule]
    return [run.summary for run in runs if run.summary is not None]


def percent(runs: list[SummaryRecord]) -> list[float]:
    """Return the test scores."""
    return [100 * run.test_score for run in runs]


def spread(runs: list[SummaryRecord]) -> str:
    """Return mean and deviation of the test scores."""
    return f"{mean(percent(runs)):.2f} ± {deviation(percent(runs)):.2f}"


def flops(runs: list[SummaryRecord]) -> float:
    """Return the mean of the training FLOPs relative to full rank."""
    return mean(run.relative_flops for run in runs)


def demo_tests() -> Iterator[str]:
    """Yield the comparison of the demo's schedules."""
    names = ("decay", "low-rank", "full-rank")
    pairs = compare_pairs({name: percent(summaries(DEMO, name)) for name in names})
    found = {(pair.first, pair.second): pair for pair in pairs}
    best = found["decay", "low-rank"]
    yield (
        f"Decay is better than low rank by {best.difference:.2f} points "
        f"(interval {best.low:.2f} to {best.high:.2f}, p = {best.p:.3f}, Welch's t-test"
    )
    differ = "different" if found["decay", "full-rank"].significant else "indistinguishable"
    yield f"full rank and decay are statistically {differ}"
