"""README: the demo's table and what argues against a schedule."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.training.harness.evidence import DECIDING, ROOT
from benchmarks.training.harness.summary import ALL_FLOPS, FULL, SECONDS
from dynarank.cost.scale import Cluster
from dynarank.records import PhaseRecord, SummaryRecord
from dynarank.report.comparison import compare_pairs

from .experiments import (
    BETTER,
    BYTE,
    DECAY,
    DEEPER,
    FIXED,
    GPT,
    HALF_FIXED,
    LARGER,
    LONG,
    LONG_DECAY,
    LONG_MLP,
    MEDIUM,
    MLP,
    NARROW,
    RESNET,
    SST,
    VIT,
    WIDE,
    WRN,
    behind,
    compared,
    corrected,
    corrected_to_fixed,
    found,
    led,
    longer,
    parameters,
    rate,
    rates_tried,
    share,
    steps_of_tuning,
    unclipped,
    verb,
)
from .records import deviation, mean, only, read_json, read_runs
from .versions import python
from .words import NUMBERS, PARTS, part, says

PAGE = "README.md"
DEMO = "training/results/2026-11-28-demo"
SETTINGS = (
    "Apache-2.0",
    "by the 95% interval of one difference",
)
NO_RESULTS = (
    "low-rank where that is enough, and a schedule changes them",
    "survive every change",
    "in parentheses all FLOPs",
    "2025",
    '"Better" is by the 95% interval of one difference; [all arms, what',
    "beside the records and weights of each run",
    "then one object and one line more:",
    "With a trainer it is one line:",
    "best models and",
    "what each phase costs",
    "is one line and can be enough: on the MLP of width 1024",
    "([all layers]",
    "**To lower peak memory.** The peak is at least that of the full-rank phase.",
    "through every change",
    "and every other optimizer",
    "each with its test",
    "each with what was measured",
    "each a file that runs",
)


def claims() -> Iterator[str]:
    """Yield the figures in the order of the page."""
    yield table()
    yield from gains()
    yield from elsewhere()
    yield costs()
    yield from demo()
    yield from demo_tests()
    yield f"With Python {python()} or newer"
    yield from low_rank()
    yield from seconds()
    yield memory()


def table() -> str:
    """Return how the arms of the table were tuned."""
    experiments = [found(name).experiment for name in DECIDING]
    return says(
        "each arm with the best learning rate of several, chosen on other seeds",
        all(set(one.seeds).isdisjoint(one.tuning) for one in experiments),
        all(rates_tried(name) > 2 for name in DECIDING),
    )


def costs() -> str:
    """Return what a decay and a narrower network save beside FLOPs."""
    decays = {name: found(name).decay("0.65") for name in DECIDING}
    timed = [name for name in DECIDING if name != RESNET]
    narrow = (GPT, BYTE, DEEPER, LARGER, VIT)
    return says(
        "A decay saves no peak memory and, where layers are narrow, little time; a narrower "
        "network saves both.",
        all(found(name).share(arm, "memory_peak") > 0.99 for name, arm in decays.items()),
        all(found(name).share(found(name).decay("0.65"), SECONDS) > 0.9 for name in narrow),
        all(found(name).share("narrower, 0.65", "memory_peak") < 0.8 for name in DECIDING),
        all(found(name).share("narrower, 0.65", SECONDS) < 0.9 for name in timed),
    )


def low_rank() -> Iterator[str]:
    """Yield what plain low rank gives."""
    small = "fixed 1/16"
    yield (
        f"low rank at 1/16 of the rank {verb(WIDE, small)} full rank, for "
        f"{share(WIDE, small, ALL_FLOPS)} of the FLOPs and {share(WIDE, small, SECONDS)} of "
        f"the CPU seconds ([n = {found(WIDE).arms[small].n}]"
    )
    rates = {name: (rate(name, arm), rate(name, FULL)) for name, arm in _LOW.items()}
    yield says(
        "Tune its learning rate: the best is often another than full rank's, higher or lower.",
        {(low > full) - (low < full) for low, full in rates.values()} == {-1, 0, 1},
        sum(low != full for low, full in rates.values()) > len(rates) / 2,
    )
    yield says(
        "No schedule we tried was clearly better than fixed low rank at equal FLOPs",
        not any(
            found(name).changes(arm)
            for name in (RESNET, DEEPER, LARGER, WRN)
            for arm in corrected_to_fixed(name)
        ),
    )


def seconds() -> Iterator[str]:
    """Yield what fewer FLOPs are in seconds."""
    record = read_json("layers/results/2026-11-24-cpu/layers.json")
    conv = only(record["rows"], layer="conv 3x3, 16 channels, 32x32, batch 32", share="1/8")
    speedup = conv["ms"]["full-rank"]["median"] / conv["ms"]["factored"]["median"]
    threads = int(record["conditions"]["hardware"].split(", ")[1].split()[0])
    yield (
        f"On {NUMBERS[threads]} CPU thread a 16-channel convolution with {conv['flop_ratio']:.1f} "
        f"times fewer FLOPs is {speedup:.2f} times as fast"
    )
    bounds = [_BYTES * Cluster().peak_flops / one for one in _BANDWIDTHS.values()]
    yield f"narrower than about {round(mean(bounds), -2):.0f} are limited by memory bandwidth"


def memory() -> str:
    """Return where fixed low rank lowers the peak."""
    small = (GPT, BYTE, VIT, RESNET, DEEPER, LARGER)
    return says(
        "lower it where weights are most of the memory, as in MLPs;",
        *(found(name).share("fixed 0.65 FLOPs", "memory_peak") > 0.95 for name in small),
        found(MLP).share("fixed 0.65 FLOPs", "memory_peak") < 0.8,
        *(found(WIDE).share(arm, "memory_peak") < 0.4 for arm in ("fixed 0.2 FLOPs", _LOW[WIDE])),
        found(MLP).share("rotating", "memory_peak") < 0.9,
    )


def gains() -> Iterator[str]:
    """Yield what the table comes to on GPTs."""
    decay, low, narrow = DECAY, "fixed 0.65 FLOPs", "narrower, 0.65"
    assert verb(GPT, decay, narrow) == verb(GPT, decay, low)
    yield (
        "**A decay pays on GPTs, in short runs.** On the character GPT, at "
        f"{share(GPT, decay)} of the training FLOPs, it "
        f"{verb(GPT, decay, low)} fixed low rank of the same FLOPs by "
        f"{behind(GPT, low, decay).replace('s.e.', 's.e., standard error,')}, than a narrower "
        f"network by {behind(GPT, narrow, decay)}, and {verb(GPT, decay)} full rank, behind which "
        f"it is by {behind(GPT, decay)}."
    )
    yield smaller_decay()
    pairs = [(MEDIUM, decay, narrow), (MEDIUM, decay, low)]
    pairs += [(BYTE, "decay 0.65", other) for other in (narrow, low, FULL)]
    (better,) = {verb(*pair) for pair in pairs}
    half = "decay 0.5"
    yield (
        f"On the byte GPT and the GPT of {parameters(MEDIUM)} parameters a decay {better} both "
        f"too, and on the byte GPT than full rank, by {behind(BYTE, FULL, 'decay 0.65')}; there a "
        f"decay at {share(BYTE, half)} {verb(BYTE, half)} full rank."
    )
    yield from tunings_of_gpts()


def smaller_decay() -> str:
    """Return how a smaller decay compares with the narrower network of the character GPT."""
    smaller, narrow = found(GPT).decay("0.5"), "narrower, 0.65"
    gain = found(GPT).difference(smaller, narrow)
    assert gain is not None and gain.low > 0
    return (
        f"The narrower one has {share(GPT, narrow, ALL_FLOPS)}x of all FLOPs; a decay at "
        f"{share(GPT, smaller, ALL_FLOPS)}x {verb(GPT, smaller, narrow)} it by {gain.mean:.3f} "
        f"(interval {gain.low:.3f} to {gain.high:.3f})."
    )


def tunings_of_gpts() -> Iterator[str]:
    """Yield what the decays of the larger GPTs owe to clipping and rates."""
    full, decay = (mean(unclipped(arm)) for arm in (FULL, "decay 0.65"))
    yield says(
        "The byte GPT's gradients are clipped; that was added after tests in which a decay was "
        f"behind full rank, with {decay:.3f} against {full:.3f}.",
        "clipped" in found(BYTE).experiment.title,
        decay > full,
    )
    others = (FULL, "fixed 0.65 FLOPs", "narrower, 0.65")
    (times,) = {rate(MEDIUM, DECAY) / rate(MEDIUM, arm) for arm in others}
    yield (
        f"On the largest GPT the decay has {_TIMES[times]} the learning rate of the others; "
        f"{NUMBERS[len(found(MEDIUM).experiment.tuning)]} seed chose it, in {steps_of_tuning()} "
        "steps."
    )
    steps = sorted(found(name).arms[FULL].runs[0]["steps"] for name in (GPT, BYTE, MEDIUM))
    yield f"These are short runs, of {steps[0]} to {steps[-1]} steps."
    yield longer_run()


def longer_run() -> str:
    """Return how the arms of the character GPT compare in more steps."""
    decay, one = LONG_DECAY, found(LONG)
    (seeds,) = {arm.n for arm in one.arms.values()}
    tuned_on, length = NUMBERS[len(one.experiment.tuning)], PARTS[1 / one.experiment.tuning_length]
    return (
        f"In one of {one.arms[FULL].runs[0]['steps']:,} steps (n = {seeds}) the character GPT's "
        f"decay {verb(LONG, decay, FIXED)} fixed low rank by {behind(LONG, FIXED, decay)}, but "
        f"{verb(LONG, decay, NARROW)} a narrower network by {behind(LONG, decay, NARROW)}, and "
        f"{verb(LONG, decay, 'shorter, 0.65')} shorter training; rates were chosen on {tuned_on} "
        f"seed in runs of {length} the length."
    )


def elsewhere() -> Iterator[str]:
    """Yield what the table comes to on other networks."""
    yield from perceptrons()
    yield from convolutions()
    halved = PARTS[round(1 / found(VIT).experiment.tuning_length)]
    narrow, decay = "narrower, 0.65", found(VIT).decay("0.65")
    yield (
        f"on the ViT it is not settled: a narrower network {than(VIT, narrow, decay)} points, but "
        f"rates were chosen in runs of {halved} the length, in which the decay led full rank by "
        f"{led():.2f}; on a small BERT and SST-2 fixed low rank at {share(SST, HALF_FIXED)} "
        f"{verb(SST, HALF_FIXED)} full rank."
    )


def than(name: str, arm: str, other: str) -> str:
    """Return how an arm compares with another that was named before, and by how much."""
    return f"{verb(name, arm, other).removesuffix(' than')} by {behind(name, other, arm)}"


def perceptrons() -> Iterator[str]:
    """Yield what the table comes to on MLPs."""
    decay, low = DECAY, "fixed 0.65 FLOPs"
    assert verb(MLP, decay, "narrower, 0.65") != BETTER
    yield (
        f"on that of width 256 it {verb(MLP, decay, low)} fixed low rank by "
        f"{behind(MLP, low, decay)} points ({share(MLP, low, ALL_FLOPS)}x is with the products of "
        "its weight decay), but no better than a narrower network;"
    )
    yield says(
        f"in runs {longer(LONG_MLP, MLP)} times as long, corrected, no arm is distinguishable from "
        "full rank;",
        not corrected(LONG_MLP, FULL),
    )
    fifth = "fixed 0.2 FLOPs"
    costs = {arm: share(WIDE, arm, ALL_FLOPS) for arm in (fifth, "decay 0.2", "decay 0.3")}
    others = {FULL: "full rank", "narrower, 0.3": "a narrower network"}
    others |= {arm: f"a decay at {cost}" for arm, cost in costs.items() if arm != fifth}
    yield (
        f"on one of width 1024 fixed low rank, at {costs[fifth]} of all FLOPs, "
        f"{compared(WIDE, fifth, others)}."
    )


def convolutions() -> Iterator[str]:
    """Yield what the table comes to on convolutional networks."""
    low, narrow = "fixed 0.65 FLOPs", "narrower, 0.65"
    names = (RESNET, DEEPER, LARGER, WRN)
    (alike,) = {verb(name, found(name).decay("0.65"), low) for name in names}
    yield (
        f"on the ResNets it {alike} fixed low rank, and on the WRN-16-4 a narrower network "
        f"{than(WRN, narrow, found(WRN).decay('0.65'))} points."
    )


_BYTES = 2  # moved for a FLOP, times the width: bf16 in and out, 4 bytes for 2 FLOPs
_BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second
_TIMES = {1: "once", 2: "twice"}
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


def demo() -> Iterator[str]:
    """Yield the demo's picture in words, what was run, and the table."""
    full, low, decay = (summaries(DEMO, name) for name in ("full-rank", "low-rank", "decay"))
    (costs,) = {f"{flops(runs):.2f}" for runs in (low, decay)}
    yield picture(mean(percent(full)) - mean(percent(low)), full, decay)
    (n,) = {len(runs) for runs in (full, low, decay)}
    recipe = read_json(f"{DEMO}/common.json")
    yield says(
        f"An MLP on shifted digits, {NUMBERS[n]} seeds, one learning rate for all, "
        f"{recipe['precision']} on a CPU ([records and the one command that made them]",
        isinstance(recipe["recipe"]["learning_rate"], float),
    )
    yield (
        f"Low rank and *decay* have the same budget, a {part(float(costs))} of full rank's "
        f"training FLOPs; decay starts at full rank and comes down in {NUMBERS[cuts()]} early cuts."
    )
    for name, runs in {"full rank": full, "low rank": low, "decay": decay}.items():
        yield f"test accuracy, % (n = {n})"
        peak = f"{runs[0].trainable_parameters_peak:,}"
        yield f"| {name} | {spread(runs)} | {flops(runs):.3f}x | {peak} |"


def picture(lost: float, full: list[SummaryRecord], decay: list[SummaryRecord]) -> str:
    """Return what the picture shows."""
    shown = ROOT / "docs/images/demo.svg"
    charts = shown.read_text(encoding="utf-8").count('class="title"')
    return says(
        f"{NUMBERS[charts].capitalize()} charts over {read_json(f'{DEMO}/common.json')['epochs']} "
        f"epochs. Decay starts at full rank, comes down in {NUMBERS[cuts()]} early cuts, costs as "
        "much as a fixed low rank in all, and ends as accurate as full rank; low rank ends "
        f"{NUMBERS[round(lost)]} points lower.",
        not compare_pairs({"decay": percent(decay), "full": percent(full)})[0].significant,
    )


def cuts() -> int:
    """Return in how many cuts the demo's decay comes down from full rank, all in its first part."""
    (found,) = {
        tuple((phase.epoch, phase.relative_flops) for phase in run.all(PhaseRecord))
        for run in read_runs(DEMO)
        if run.header.schedule == "decay"
    }
    assert found[0] == (0, 1) and found[-1][0] < read_json(f"{DEMO}/common.json")["epochs"] / 4
    return len(found) - 1


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
    yield (
        f"full rank and decay are statistically {differ}. All have one learning rate; with one of "
        "its own, low rank may come closer."
    )
