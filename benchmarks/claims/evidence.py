"""Evidence: for whom a schedule pays, and the answers."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, stdev

from benchmarks.training.harness.comparison import LIKE, same_order
from benchmarks.training.harness.summary import ALL_FLOPS, CHEAP, CHEAP_END, FEW, FULL, SECONDS
from benchmarks.training.harness.tables import around, at_end, verdict
from benchmarks.training.problems.problem import Problem

from .experiments import (
    ALIKE,
    BETTER,
    BYTE,
    DECAY,
    DEEPER,
    ENCODER,
    ENCODERS,
    FIXED,
    GPT,
    GPTS,
    HALF_FIXED,
    HALF_NARROW,
    LARGER,
    LARGEST,
    LIKE_LOW,
    LONG,
    LONG_DECAY,
    LONG_MLP,
    LOW,
    MEDIUM,
    MLP,
    NARROW,
    NARROWED,
    PAIRS,
    RESNET,
    RESNETS,
    SMALL_BERT,
    SST,
    TABLE,
    VIT,
    WIDE,
    WORSE,
    WRN,
    behind,
    compared,
    corrected,
    corrected_to_fixed,
    cuts,
    first_cut,
    found,
    led,
    listed,
    longer,
    parameters,
    rate,
    rates_tried,
    result,
    share,
    steps_of_tuning,
    tuned,
    unclipped,
    verb,
    verbs,
)
from .records import deviation, mean, select
from .words import NUMBERS, PARTS, part, says

PAGE = "docs/evidence.md"
SETTINGS = (
    "95% intervals",
    "t-test at 5%",
    *("fixed 0.5 FLOPs", "narrower, 0.5", "shorter, 0.5", "decay 0.5", "full first 0.5"),
    "Is full rank met at 0.65 of its FLOPs?",
    "at 80% of the run",
)
NO_RESULTS = (
    "or where a schedule costs more than any low rank), and the best learning rate for each",
    "in parentheses all FLOPs: of training,",
    "full rank's being 1.",
    "the [tables of each problem]",
    "![Quality against all FLOPs:",
    'Below, "better" and "worse" mean that the 95% interval of that one difference is without '
    "zero.",
    "Before each cut a few batches pass through the network",
    "The longer the run, the less either is.",
    "([one GPU]",
    "Those for which no other arm is as good at the same cost or less, by the means; all FLOPs.",
    "All arms of each problem, with pictures:",
    "The largest decay of each problem, and the paper's order",
    "positive is better; bold where the 95% interval of this one difference is without zero.",
    "Within one standard error, by an arm",
    "so by arms of about half of the FLOPs;",
    "empty where no arm is that cheap. Named is the best by its mean over all seeds; the "
    "difference beside it is, for each seed, of the arm that is best on the other seeds, since the "
    "best of many would else look better than it is.",
    "Kendall's tau of the means; 1 is the same order",
    "All FLOPs / CPU seconds /",
    "Where does none of it help?",
    "**Equal terms.**",
    "Only the fixed ranks with the counterparts",
    "changes, of decaying products and of penalties, counted on a replay of one run of each arm",
    'Budgets, and "the same FLOPs", are of training; pictures, fronts and the tables of this page '
    "have all FLOPs, the sum of both.",
    "The learning rate of each arm is",
    "All relative to full rank: seconds to those of full-rank steps timed beside the same run, on "
    "one kind of machine for all arms of a table. Arms that had none were repeated once for that;",
    "with their 95% intervals; positive is better.",
    'Under a table "better" and "worse" mean',
    "Holm's correction for all arms of the table;",
    'seeds only clear differences pass it, and "not distinguishable" is not "equal". Where the '
    "answers above compare two arms by name, it is the interval of that one difference,",
    "are on the front: no other arm is as good at the same FLOPs or fewer, by the means. "
    '"Met within one standard error" is',
    "(both said under each table)",
    "no rate was fair",
    "a rate that is no longer chosen",
    "two runs at a time, other work beside them, the runs of a table not all on one day,",
    "such that training costs half of the FLOPs",
    "that is narrower, of half of the FLOPs",
    "the whole network for half of the steps;",
    'where there is an arm "8 batches" too',
    "half of the rank, two branches, new moments",
    "rank 1/4 where they take one",
    "a quarter of the rank | their packages",
)


def claims() -> Iterator[str]:
    """Yield the sentences of the page."""
    yield repeated()
    yield corrections()
    yield from transformers()
    yield from perceptrons()
    yield from convolutions()
    yield from vit()
    yield from pretrained()
    yield from costs()
    yield from calibrations()
    yield from fronts()
    yield from met()
    yield from inflation()
    yield from orders()
    yield from seconds()
    yield from helps_nobody()
    yield from others()
    yield from tunings()
    yield from machine()
    yield from arms()


def repeated() -> str:
    """Return of how many problems the data cannot be had."""
    books = [name for name in NARROWED if "books" in found(name).experiment.title]
    return f"All of it can be repeated, the {NUMBERS[len(books)]} GPTs on books"


def corrections() -> str:
    """Return which differences remain with Holm's correction."""
    lora = {arm for arm in found(ENCODER).arms if "LoRA" in arm}
    return says(
        "With Holm's correction for comparing all arms of a problem, a decay's gains on the "
        "character and the byte GPT remain, and that over the narrower network on the largest; "
        "those over fixed low rank on the largest GPT and the MLP of width 256, its losses on the "
        "ViT, and LoRA's on MRPC and RTE do not.",
        all(DECAY in corrected(GPT, other) for other in (FIXED, NARROW)),
        all("decay 0.65" in corrected(BYTE, other) for other in (FULL, FIXED, NARROW)),
        "decay 0.5" in corrected(BYTE, FIXED),
        DECAY in corrected(MEDIUM, NARROW) and DECAY not in corrected(MEDIUM, FIXED),
        DECAY not in corrected(MLP, FIXED),
        not any("decay 0.65" in corrected(VIT, other) for other in (FULL, FIXED, NARROW)),
        not any(lora & set(corrected(name, FULL)) for name in PAIRS),
    )


def transformers() -> Iterator[str]:
    """Yield what the GPTs say."""
    (better,) = verbs(GPT, [DECAY], FIXED, NARROW, "shorter, 0.65")
    yield (
        f"On the character GPT a decay at {share(GPT, DECAY)} of the FLOPs {better} fixed low "
        f"rank, a narrower network and shorter training, and {verb(GPT, DECAY)} full rank."
    )
    yield from byte_gpt()
    (better,) = verbs(MEDIUM, [DECAY], FIXED, NARROW)
    time = share(MEDIUM, DECAY, SECONDS)
    yield (
        f"On the GPT of {parameters(MEDIUM)} parameters it {better} fixed low rank and the "
        f"narrower network, and {verb(MEDIUM, DECAY)} full rank, for {time} of its CPU seconds."
    )
    steps = sorted(found(name).arms[FULL].runs[0]["steps"] for name in GPTS)
    yield f"All {NUMBERS[len(GPTS)]} are short runs, of {steps[0]} to {steps[-1]} steps."
    yield from longer_gpt()
    yield from unclipped_gpt()
    yield from largest_gpt()


def longer_gpt() -> Iterator[str]:
    """Yield how the arms of the character GPT compare in more steps."""
    decay, one = LONG_DECAY, found(LONG)
    (seeds,) = {arm.n for arm in one.arms.values()}
    assert verb(LONG, decay, "shorter, 0.65") == verb(LONG, decay)
    yield (
        f"In one of {one.arms[FULL].runs[0]['steps']:,} steps (n = {seeds}) the character GPT's "
        f"decay has {result(LONG, decay)}: it {verb(LONG, decay, FIXED)} fixed low rank, "
        f"{result(LONG, FIXED)}, {verb(LONG, decay, NARROW)} a narrower network, "
        f"{result(LONG, NARROW)}, and {verb(LONG, decay)} shorter training, "
        f"{result(LONG, 'shorter, 0.65')}, and full rank, {result(LONG, FULL)}; the paper's order "
        f"has {result(LONG, LOW)}."
    )
    lead, other = (max(tuned(LONG, arm).values()) for arm in (decay, NARROW))
    yield says(
        f"Its rates were chosen on {NUMBERS[len(one.experiment.tuning)]} seed in runs of "
        f"{PARTS[1 / one.experiment.tuning_length]} the length, in which the decay led the "
        f"narrower network by {lead - other:.3f}.",
        lead > other,
    )


def byte_gpt() -> Iterator[str]:
    """Yield what the byte GPT says."""
    decay, half = "decay 0.65", "decay 0.5"
    others = (FIXED, NARROW, "shorter, 0.65")
    (better,) = verbs(BYTE, [decay], FULL, *others)
    assert verbs(BYTE, [half], HALF_FIXED, HALF_NARROW, "shorter, 0.5") == {better}
    yield (
        f"On the byte GPT it {better} full rank, by {behind(BYTE, FULL, decay)}, and than all "
        f"{NUMBERS[len(others)]}, and a decay at {share(BYTE, half)} {verb(BYTE, half)} full rank "
        f"and {better} those {NUMBERS[len(others)]} at half of the FLOPs."
    )


def unclipped_gpt() -> Iterator[str]:
    """Yield what the byte GPT had given before its gradients were clipped."""
    full, decay = map(unclipped, (FULL, "decay 0.65"))
    texts = [f"{mean(v):.3f} ± {deviation(v):.3f} (n = {len(v)}" for v in (full, decay)]
    yield says(
        "The byte GPT's gradients are clipped; before they were, at rates that were hardly fair, "
        f"full rank had {texts[0]}) and a decay {texts[1]};",
        "clipped" in found(BYTE).experiment.title,
        mean(decay) > mean(full),
    )


def largest_gpt() -> Iterator[str]:
    """Yield how the rates of the largest GPT were chosen, and when its decay is ahead."""
    assert "clipped" not in found(MEDIUM).experiment.title
    decays = {DECAY, "decay 0.65"}
    (mine,) = {rate(MEDIUM, arm) for arm in decays}
    (others,) = {rate(MEDIUM, arm) for arm in found(MEDIUM).arms if arm not in decays}
    seeds = NUMBERS[len(found(MEDIUM).experiment.tuning)]
    yield (
        f"Those of the largest GPT are not, and {seeds} seed chose its rates in "
        f"{steps_of_tuning()} steps: {mine:g} of the problem's own for the decay, {others:g} for "
        "all others."
    )
    losses = dict(sorted((one.rate, -result) for one, result in tuned(MEDIUM, FULL).items()))
    texts, rates = [f"{loss:.3f}" for loss in losses.values()], [f"{one:g}" for one in losses]
    first, second, third, last = losses.values()
    assert second < first and second < third and last < third
    yield (f"Full rank's losses there go up and down, {listed(texts)} at rates of {listed(rates)}.")
    leads = [ahead(50), ahead(200), ahead(400)]
    texts = [f"{lead:.3f}" for lead in leads]
    yield says(
        f"In whole runs the decay leads full rank in validation by {texts[0]} at step 50, "
        f"{texts[1]} at 200 and {texts[2]} at the end, some of it perhaps by its rate.",
        min(leads) > 0,
        mine > others,
        found(MEDIUM).arms[FULL].runs[0]["steps"] == 400,
    )


def ahead(step: int) -> float:
    """Return by how much the decay is ahead of full rank at a step, in validation."""
    runs = (found(MEDIUM).arms[arm].runs for arm in (FULL, DECAY))
    full, decay = (
        fmean(
            point["valid"]["loss"] for run in of_arm for point in select(run["points"], step=step)
        )
        for of_arm in runs
    )
    return full - decay


def perceptrons() -> Iterator[str]:
    """Yield what the MLPs say."""
    first, eight = "full first 0.3", found(MLP).decay("0.3")
    yield says(
        f"a narrower network or {cuts(MLP, first)} early cut; fixed low rank if it is wide.",
        {"full first 0.3", "narrower, 0.5"} <= found(MLP).front(),
        all(arm.startswith("fixed") for arm in found(WIDE).front()),
    )
    yield (
        f"On the MLP of width 256 a decay {verb(MLP, DECAY, FIXED)} fixed low rank of its FLOPs "
        f"but {verb(MLP, DECAY, NARROW)} a narrower network of them."
    )
    one = "Pufferfish"
    yield (
        f"{cuts(MLP, first).capitalize()} early cut at {share(MLP, first)} has "
        f"{result(MLP, first)} % and {verb(MLP, first, eight)} a decay of the same FLOPs; "
        f"Pufferfish, {cuts(MLP, one)} cut and a new warm-up, has {result(MLP, one)} at "
        f"{share(MLP, one, ALL_FLOPS)}."
    )
    yield from longer_mlp()
    yield from wide()
    yield says(
        "On the table of scikit-learn's, corrected, no arm is distinguishable from full rank.",
        not corrected(TABLE, FULL),
    )


def longer_mlp() -> Iterator[str]:
    """Yield how the arms of the narrow MLP compare in more steps."""
    half, narrow, decay = "shorter, 0.5", "narrower, 0.3", "decay 0.3"
    yield says(
        f"In runs {longer(LONG_MLP, MLP)} times as long, corrected, no arm is distinguishable from "
        f"full rank, {result(LONG_MLP, FULL)}, or from fixed low rank of its FLOPs: half of the "
        f"steps at full rank give {result(LONG_MLP, half)}, a narrower network at "
        f"{share(LONG_MLP, narrow)} {result(LONG_MLP, narrow)}, a decay at "
        f"{share(LONG_MLP, decay)} {result(LONG_MLP, decay)}.",
        not corrected(LONG_MLP, FULL),
        not corrected_to_fixed(LONG_MLP),
        found(LONG_MLP).experiment.by_name[half].length == 0.5,
    )


def wide() -> Iterator[str]:
    """Yield what the wide MLP says."""
    low, small = "fixed 0.2 FLOPs", "fixed 1/16"
    yield (
        f"On that of width 1024 fixed low rank at 1/16 of the rank has {result(WIDE, small)} % and "
        f"{verb(WIDE, small)} full rank, {result(WIDE, FULL)}, for {share(WIDE, small, ALL_FLOPS)} "
        f"of its FLOPs, {share(WIDE, small, SECONDS)} of its CPU seconds and "
        f"{share(WIDE, small, 'memory_peak')} of its memory."
    )
    yield (
        f"At {share(WIDE, low)} of the training FLOPs, {share(WIDE, low, ALL_FLOPS)} with those of "
        f"decaying products, it has {result(WIDE, low)}, for {share(WIDE, low, SECONDS)} of the "
        f"seconds and {share(WIDE, low, 'memory_peak')} of the memory."
    )
    kinds = {
        "narrower, 0.3": "a narrower network",
        "full first 0.2": f"{cuts(WIDE, 'full first 0.2')} early cut",
        "decay 0.2": "a decay",
        "decay 0.3": "a decay",
    }
    at = {arm: f"{words} at {share(WIDE, arm, ALL_FLOPS)}" for arm, words in kinds.items()}
    yield f"It {compared(WIDE, low, {FULL: 'full rank', **at})}."
    yield wide_decays()


def wide_decays() -> str:
    """Return what the decays of the wide MLP give."""
    sentences = (
        f"{words} {share(WIDE, f'decay {budget}', ALL_FLOPS)} "
        + compared(WIDE, f"decay {budget}", {
            FULL: "full rank",
            (narrow := f"narrower, {budget}"): f"a narrower network at {share(WIDE, narrow)}",
        })
        for budget, words in {"0.2": "The decay at", "0.3": "that at"}.items()
    )  # fmt: skip
    return f"{'; '.join(sentences)}."


def convolutions() -> Iterator[str]:
    """Yield what the ResNets say."""
    decay = found(LARGER).decay("0.65")
    (worse,) = verbs(LARGER, (NARROW, FIXED, decay))
    yield (
        f"On the ResNet-20 a narrower network at {share(LARGER, NARROW)} of the FLOPs has "
        f"{result(LARGER, NARROW)} %, fixed low rank at {share(LARGER, FIXED)} "
        f"{result(LARGER, FIXED)}, a decay {result(LARGER, decay)}: each {worse} full rank, "
        f"{result(LARGER, FULL)}."
    )
    for other in (FIXED, NARROW):
        assert verb(LARGER, decay, other) == verb(DEEPER, decay, other)
    yield (
        f"A decay {verb(LARGER, decay, FIXED)} fixed low rank and {verb(LARGER, decay, NARROW)} "
        "the narrower network there and on the ResNet-14;"
    )
    yield says(
        "on the ResNet-8, corrected, no schedule is distinguishable from fixed low rank of the "
        "same FLOPs.",
        verdict(found(RESNET)).startswith("No arm"),
    )
    yield from wrn()
    tunings = {name: found(name).experiment for name in (DEEPER, LARGER, WRN, RESNET)}
    (seeds,) = {len(one.tuning) for name, one in tunings.items() if name != RESNET}
    yield says(
        f"The rates of all but the ResNet-8 were chosen on {NUMBERS[seeds]} seed in shorter runs.",
        all((one.tuning_length < 1) == (name != RESNET) for name, one in tunings.items()),
        len(tunings[RESNET].tuning) > seeds,
    )


def wrn() -> Iterator[str]:
    """Yield what the WRN says."""
    decay = "decay 0.65"
    low = (decay, LOW, FIXED)
    yield (
        f"On a WRN-16-4 on CIFAR-100 (n = {found(WRN).arms[decay].n}) a narrower network at "
        f"{share(WRN, NARROW)} of the FLOPs has {result(WRN, NARROW)} %, {behind(WRN, NARROW)} "
        f"behind full rank, {result(WRN, FULL)}, for {share(WRN, NARROW, SECONDS)} of its seconds;"
    )
    (worse,) = verbs(WRN, low, FULL, NARROW)
    pairs = ((decay, LOW), (decay, FIXED), (LOW, FIXED))
    assert {verb(WRN, *pair) for pair in pairs} == {ALIKE}
    yield (
        f"a decay has {result(WRN, decay)}, the paper's order {result(WRN, LOW)}, fixed low rank "
        f"{result(WRN, FIXED)}: each {worse} both, and none is distinguishable from another, for "
        f"{share(WRN, decay, SECONDS)} to {share(WRN, LOW, SECONDS)} of the seconds; fixed low "
        f"rank of the FLOPs of the paper's order has {result(WRN, LIKE_LOW)} and "
        f"{verb(WRN, LIKE_LOW, LOW)} it."
    )


def vit() -> Iterator[str]:
    """Yield what the ViT says."""
    yield (
        f"Fixed low rank at {share(VIT, HALF_FIXED)} of the FLOPs has {result(VIT, HALF_FIXED)} % "
        f"and {verb(VIT, HALF_FIXED)} full rank."
    )
    decay, half = "decay 0.65", "decay 0.5"
    (worse,) = verbs(VIT, [decay], FULL, FIXED, NARROW)
    yield says(
        f"At {share(VIT, decay, ALL_FLOPS)} it {worse} full rank, by {behind(VIT, decay)}, than a "
        f"narrower network and than fixed low rank, one at {share(VIT, half, ALL_FLOPS)} "
        f"{verb(VIT, half, HALF_FIXED)} fixed low rank only.",
        WORSE not in verbs(VIT, [half], FULL, HALF_NARROW),
    )
    experiment = found(VIT).experiment
    yield says(
        f"But rates were chosen on {NUMBERS[len(experiment.tuning)]} seeds in runs of "
        f"{PARTS[round(1 / experiment.tuning_length)]} the length. In those the larger decay led "
        f"full rank by {led():.2f} points; here it is, by its mean, even behind the smaller one.",
        found(VIT).best((half, decay)) == half,
    )
    yield says("So its rate may be wrong for whole runs.", found(VIT).best((half, decay)) == half)


def pretrained() -> Iterator[str]:
    """Yield what the encoder says."""
    ours, peft = "LoRA, rank 8", "LoRA by PEFT, rank 8"
    cut, decay, shorter = "cut to 0.7", "decay 0.7", "shorter, 0.7"
    yield says(
        "LoRA, or fewer steps.",
        WORSE not in verbs(ENCODER, (ours, peft)),
        all(verb(name, shorter) == ALIKE for name in PAIRS),
        all(BETTER not in verbs(name, (cut, decay), shorter) for name in ENCODERS),
    )
    yield (
        f"Tuned on STS-B, all-MiniLM-L6-v2 reaches a correlation of {result(ENCODER, ours)} with "
        f"LoRA of rank 8 here and {result(ENCODER, peft)} with PEFT's, {result(ENCODER, FULL)} "
        f"with full fine-tuning, for {share(ENCODER, ours)} of its FLOPs and "
        f"{share(ENCODER, ours, 'memory_peak')} of its memory."
    )
    (worse,) = verbs(ENCODER, (cut, decay))
    yield (
        f"Of the same FLOPs, {cuts(ENCODER, cut)} cut by data before the first step has "
        f"{result(ENCODER, cut)}, a decay {result(ENCODER, decay)}: each {worse} full fine-tuning, "
        f"and the decay {verb(ENCODER, decay, shorter)} full fine-tuning for fewer steps, "
        f"{result(ENCODER, shorter)}."
    )
    yield from pairs((ours, peft), (cut, decay), shorter)


def pairs(lora: tuple[str, str], changed: tuple[str, str], shorter: str) -> Iterator[str]:
    """Yield what the encoder says when it is tuned on MRPC and RTE."""
    mrpc, rte = PAIRS
    (behind_full,) = verbs(mrpc, lora)
    (like_full,) = verbs(mrpc, (*changed, shorter))
    (alike,) = verbs(rte, (lora[1], shorter))
    (worse,) = verbs(rte, (lora[0], *changed))
    (n,) = {found(name).arms[FULL].n for name in PAIRS}
    (cut,) = {cuts(name, changed[0]) for name in PAIRS}
    yield (
        f"On MRPC LoRA {behind_full} full fine-tuning, and {cut} cut, a decay and fewer steps "
        f"{like_full.replace('is ', 'are ')} it; on RTE PEFT's LoRA and fewer steps "
        f"{alike.replace('is ', 'are ')} it, LoRA here, {cut} cut and a decay "
        f"{worse.replace('is ', 'are ')} it (n = {n}, of {_tested(mrpc)} and {_tested(rte)} test "
        "pairs)."
    )
    further = [found(name).further(changed[1]) or 0 for name in ENCODERS]
    yield says(
        f"costs a further {further[0]:.2f} of a tuning this short",
        {f"{one:.1f}" for one in further} == {f"{further[0]:.1f}"},
    )


def _tested(name: str) -> int:
    """Return how many test examples percentages of these steps are of."""
    values = found(name).arms[FULL].values.values()
    return next(n for n in range(1, 2000) if all(_whole(v * n / 100, n) for v in values))


def _whole(count: float, n: int) -> bool:
    return abs(count - round(count)) < n * 5e-7


def costs() -> Iterator[str]:
    """Yield what memory and seconds say."""
    yield says(
        f"On the character GPT the narrower network takes {share(GPT, NARROW, 'memory_peak')} of "
        f"full rank's memory and {share(GPT, NARROW, SECONDS)} of its CPU seconds, the decay of "
        f"{share(GPT, DECAY)} takes {share(GPT, DECAY, 'memory_peak')} and "
        f"{share(GPT, DECAY, SECONDS)}, fixed low rank {share(GPT, FIXED, 'memory_peak')} and "
        f"{share(GPT, FIXED, SECONDS)}: layers this narrow do not turn fewer FLOPs into seconds, "
        "and what factors save in weights they take in activations.",
        all(found(GPT).share(arm, SECONDS) > 0.95 for arm in (DECAY, FIXED)),
        found(GPT).share(FIXED, "memory_peak") >= 1,
    )
    light = {MLP: FIXED, TABLE: FIXED, WIDE: "fixed 0.3 FLOPs"}
    heavy = (GPT, BYTE, *RESNETS, VIT, SMALL_BERT, SST)
    yield says(
        "Where weights are most of the memory, fixed low rank saves it: on MLPs, and a "
        f"{part(1 - found(MEDIUM).share(FIXED, 'memory_peak'))} on the largest GPT.",
        all(found(name).share(arm, "memory_peak") < 0.8 for name, arm in light.items()),
        all(found(name).share(FIXED, "memory_peak") > 0.95 for name in heavy),
    )


def calibrations() -> Iterator[str]:
    """Yield what calibration costs on more and on fewer batches."""
    names = (GPT, MLP, RESNET)
    many, few = (
        [f"{found(name).further(arm):.2f}" for name in names] for arm in ("decay 0.65", DECAY)
    )
    (cut,) = {cuts(name, arm) for name in names for arm in (DECAY, "decay 0.65")}
    (batches,) = {found(name).experiment.by_name[DECAY].batches for name in names}
    yield (
        f"With {Problem.calibrated_on} of them the {cut} cuts of a decay of "
        f"{share(GPT, 'decay 0.65')} cost a further {many[0]} of full rank's training on the "
        f"character GPT, {many[1]} on the MLP of width 256 and {many[2]} on the ResNet-8"
    )
    yield says(
        f"with {batches}, which is the default, {few[0]}, {few[1]} and {few[2]}, and the results "
        "are not distinguishable.",
        *(verb(name, DECAY, "decay 0.65") == ALIKE for name in names),
    )


def fronts() -> Iterator[str]:
    """Yield who is on the front."""
    fronts = {name: found(name).front() for name in NARROWED}
    yield says(
        "Wherever narrower networks have run, one of them is on the front against FLOPs, but on "
        "the MLP of width 1024: there only fixed low rank is.",
        all(
            any(arm.startswith("narrower") for arm in front) == (name != WIDE)
            for name, front in fronts.items()
        ),
        all(arm.startswith("fixed") for arm in fronts[WIDE]),
    )
    fewer = [
        found(name).share(found(name).decay(budget), "flops")
        - found(name).share(f"narrower, {budget}", "flops")
        for name, budget in LARGEST.items()
    ]
    assert min(fewer) >= 0
    yield f"narrower networks up to {max(fewer):.1f} of full rank's fewer"


def met() -> Iterator[str]:
    """Yield who meets full rank."""
    yield f"no more than {CHEAP} of all FLOPs and ends with a network of {CHEAP_END} or less,"
    half = "decay 0.5"
    difference = behind(GPT, DECAY).replace(" (", " behind, ").removesuffix(")")
    yield says(
        f"On the byte GPT yes, by a decay at {share(BYTE, half, ALL_FLOPS)}, which ends at "
        f"{share(BYTE, half, 'end_flops')} of full rank's FLOPs a step; on the character GPT no (a "
        f"decay comes near, {difference}, at {share(GPT, DECAY, ALL_FLOPS)}), and on the largest "
        f"GPT one meets it for {share(MEDIUM, DECAY, ALL_FLOPS)} in all.",
        bool(found(BYTE).meets_full(half) and found(BYTE).cheap(half)),
        not any(found(name).meets_full(arm) for name in (GPT, MEDIUM) for arm in cheap(name)),
        bool(found(MEDIUM).meets_full(DECAY)),
    )
    yield met_on_images()
    yield says(
        "On MRPC, SST-2 and the table some do,",
        *(any(schedule(name, arm) for arm in cheap(name)) for name in (SMALL_BERT, SST, TABLE)),
    )
    yield from not_cheap()


def met_on_images() -> str:
    """Return which schedules meet full rank on images."""
    images = {
        name: [f"“{arm}”" for arm in cheap(name) if schedule(name, arm)]
        for name in (MLP, WIDE, *RESNETS, WRN, VIT)
    }
    (one,) = images[VIT]
    return says(
        f"On images some schedules meet it on the MLP of width 1024 ({', '.join(images[WIDE])}), "
        f"as fixed low rank does, and one on the ViT ({one}), within its noise; on the others none "
        "of that cost does.",
        {name for name, arms in images.items() if arms} == {WIDE, VIT},
        any(arm.startswith("fixed") and found(WIDE).meets_full(arm) for arm in cheap(WIDE)),
    )


def not_cheap() -> Iterator[str]:
    """Yield where no schedule is cheap enough to count."""
    none = (MEDIUM, LARGER, WRN, *ENCODERS)
    last = (LARGER, WRN)
    decays = {name: found(name).decay("0.7" if name in ENCODERS else "0.65") for name in none}
    yield says(
        "Where the table has none, on the largest GPT, the encoders, the ResNet-20 and the "
        "WRN-16-4, a decay spends more with calibration; on the last "
        f"{NUMBERS[len(last)]} it is worse than full rank all the same.",
        not any(found(name).changes(arm) for name in none for arm in cheap(name)),
        all(found(name).share(arm, ALL_FLOPS) > CHEAP for name, arm in decays.items()),
        all(verb(name, decays[name]) == WORSE for name in last),
    )
    yield says(
        f"The paper's order costs more than {CHEAP} everywhere.",
        all(found(name).share(LOW, ALL_FLOPS) > CHEAP for name in NARROWED),
    )


def inflation() -> Iterator[str]:
    """Yield what inflation restored, and what it was worth."""
    adapted = [name for name in NARROWED if "paper, svd" in found(name).arms]
    rises = {name: after - before for name in NARROWED for before, after in [restored(name)]}
    yield says(
        "The rank rose everywhere while layers were full-rank, on the table, the largest GPT and "
        "the MLP of width 1024 by little; an adapted ending keeps it.",
        min(rises.values()) > 0,
        set(sorted(rises, key=rises.__getitem__)[:3]) == {TABLE, MEDIUM, WIDE},
        all(at_end(found(name).arms["paper, svd"]) > 0.95 * restored(name)[1] for name in adapted),
    )
    yield from worth()
    (worse,) = verbs(BYTE, [LOW], LIKE_LOW, FIXED)
    yield says(
        f"On the byte GPT the paper's order {worse} fixed low rank of its FLOPs, and of "
        f"{share(BYTE, FIXED)} of the FLOPs; on the ResNet-14 and the MLP of width 256 it is worse "
        "than that of its FLOPs too: more rank was not more accuracy.",
        *(verb(name, LOW, LIKE_LOW) == WORSE for name in (DEEPER, MLP)),
    )


def restored(name: str) -> tuple[float, float]:
    """Return the mean effective rank where the paper's order inflates, and before it deflates."""
    return around(found(name).arms[LOW])[:2]


def worth() -> Iterator[str]:
    """Yield what inflation was worth on the character GPT."""
    experiment = found(GPT).experiment
    ran = [name for name in NARROWED if LIKE_LOW in found(name).arms]
    better = [name for name in ran if verb(name, LOW, LIKE_LOW) == BETTER]
    like = experiment.tuned(experiment.by_name[LIKE_LOW]).name
    rank = PARTS[int(like.removeprefix("fixed 1/"))]
    yield says(
        "Where fixed low rank of the same FLOPs has run, that was worth more than its FLOPs on the "
        "character GPT only, and there that fixed low rank has the setting tuned at a "
        f"{rank} of the rank: from fixed low rank at {share(GPT, FIXED)}, tuned by itself, the "
        "paper's order is not distinguishable.",
        better == [GPT],
        experiment.tuned(experiment.by_name[FIXED]).name == FIXED,
        verb(GPT, LOW, FIXED) == ALIKE,
    )
    yield says(
        "A decay, which has full rank at the start instead of in the middle, is better than it and "
        "than fixed low rank of its FLOPs, for fewer.",
        verbs(GPT, [DECAY], LOW, LIKE_LOW) == {BETTER},
        found(GPT).share(DECAY, ALL_FLOPS) < found(GPT).share(LIKE_LOW, ALL_FLOPS),
    )


def cheap(name: str) -> list[str]:
    """Return the arms that cost few FLOPs and end at few."""
    return [arm for arm in found(name).arms if found(name).cheap(arm)]


def schedule(name: str, arm: str) -> bool | None:
    """Return whether an arm changes layers in training and meets full rank."""
    return found(name).changes(arm) and found(name).meets_full(arm)


def orders() -> Iterator[str]:
    """Yield how far the arms have one order on a smaller and a larger problem."""
    pairs = {pair: same_order(*map(found, pair)) for pair in LIKE}
    arms = {pair: len(order) for pair, (order, _) in pairs.items()}
    taus = {pair: tau for pair, (_, tau) in pairs.items()}
    gpts = [pair for pair in pairs if pair[0] in (GPT, BYTE)]
    nets = [pair for pair in pairs if pair[1] in (LARGER, WRN)]
    lows, highs = (
        [f"{of(taus[p] for p in some):.2f}" for some in (gpts, nets)] for of in (min, max)
    )
    few, many = (of(arms[pair] for pair in gpts) for of in (min, max))
    (larger,) = {arms[pair] for pair in nets}
    alike, mlps = (RESNET, DEEPER), (MLP, WIDE)
    yield (
        f"Kendall's tau is {lows[0]} to {highs[0]} on the GPTs ({few} to {many} arms), and "
        f"{taus[alike]:.2f} from the ResNet-8 to the ResNet-14 ({arms[alike]} arms); to larger "
        f"ResNets it is {lows[1]} to {highs[1]} ({larger} arms), and on the MLPs {taus[mlps]:.2f} "
        f"({arms[mlps]} arms)."
    )
    yield from same()
    yield says(
        "From MRPC to SST-2 the order turns, where hardly two arms differ.",
        taus[SMALL_BERT, SST] < -0.3,
        *(not corrected(name, FULL) for name in (SMALL_BERT, SST)),
    )


def same() -> Iterator[str]:
    """Yield what is the same on smaller and larger problems, and what is not."""
    decays = {name: found(name).decay(budget) for name, budget in LARGEST.items()}
    yield says(
        f"A decay is better than fixed low rank and the narrower network on all "
        f"{NUMBERS[len(GPTS)]} GPTs; on the ResNets full rank has the best mean, and fixed low "
        "rank, a decay and the paper's order are no better than the narrower network, on the "
        "WRN-16-4 worse.",
        all(verbs(name, [decays[name]], FIXED, NARROW) == {BETTER} for name in GPTS),
        all(found(name).best(found(name).arms) == FULL for name in (*RESNETS, WRN)),
        all(BETTER not in verbs(n, (FIXED, decays[n], LOW), NARROW) for n in RESNETS),
        verbs(WRN, (FIXED, decays[WRN], LOW), NARROW) == {WORSE},
    )
    yield says(
        "On the MLP of width 256 the narrower network is ahead of fixed low rank, on that of width "
        "1024 behind it.",
        found(MLP).best((NARROW, FIXED)) == NARROW,
        found(WIDE).best(("narrower, 0.2", "fixed 0.2 FLOPs")) == "fixed 0.2 FLOPs",
        found(WIDE).best(("narrower, 0.3", "fixed 0.3 FLOPs")) == "fixed 0.3 FLOPs",
    )
    yield says(
        "The paper's order, behind all of these on the ResNet-8 and the ResNet-14, is second on "
        f"the ResNet-20 by its mean, for {share(LARGER, LOW, ALL_FLOPS)} of the FLOPs, where fixed "
        f"low rank of those has {result(LARGER, LIKE_LOW)} and {verb(LARGER, LIKE_LOW, NARROW)} "
        f"the narrower network of {share(LARGER, NARROW)}.",
        [place(name) for name in RESNETS] == [5, 5, 2],
    )


def place(name: str) -> int:
    """Return the place of the paper's order among the main arms, by their means; 1 is the best."""
    results = found(name).arms
    main = [FULL, NARROW, FIXED, found(name).decay("0.65"), LOW]
    return sorted(main, key=lambda arm: -results[arm].result).index(LOW) + 1


def seconds() -> Iterator[str]:
    """Yield where FLOPs become seconds."""
    narrow = {name: f"narrower, {budget}" for name, budget in LARGEST.items()}
    timed = {name: arm for name, arm in narrow.items() if name != RESNET}
    early = [(MLP, "full first 0.3"), (WIDE, "full first 0.2"), (WIDE, "full first 0.3")]
    (less,) = {saved(WIDE, arm) for arm in ("fixed 0.3 FLOPs", "decay 0.3")}
    slow = [(name, arm) for name in (DEEPER, LARGER, VIT) for arm in (*_BOTH, LOW)]
    yield says(
        f"Narrower networks take less time, on the table by a {saved(TABLE, NARROW)} only, "
        f"{cuts(*early[0])} early cut does on the MLPs at {share(*early[0])} and less, fixed low "
        f"rank and a decay do on the GPT of {parameters(MEDIUM)} parameters and, by about a "
        f"{less}, on the MLP of width 1024;",
        all(found(name).share(arm, SECONDS) < 0.95 for name, arm in timed.items()),
        all(found(name).share(arm, SECONDS) < 0.9 for name, arm in early),
        all(found(MEDIUM).share(arm, SECONDS) < 0.95 for arm in (FIXED, DECAY)),
    )
    (less,) = {saved(WRN, arm) for arm in _BOTH}
    yield says(
        f"on the WRN-16-4, four times as wide as the ResNets, they take a {less} less; on the "
        "ResNet-14, the ResNet-20 and the ViT low rank saves FLOPs and little or no time.",
        found(WRN).experiment.short.endswith("-4"),
        all(found(name).share(arm, SECONDS) > 0.9 for name, arm in slow),
    )
    yield from untimed([*timed, *ENCODERS])


def saved(name: str, arm: str) -> str:
    """Return what part of full rank's seconds an arm saves, in words."""
    return part(1 - found(name).share(arm, SECONDS))


def untimed(others: list[str]) -> Iterator[str]:
    """Yield what of the ResNet-8 is not timed; all of the others is."""
    known = [arm for arm in found(RESNET).arms if found(RESNET).knows(arm, SECONDS)]
    (batches,) = {found(RESNET).experiment.by_name[arm].batches for arm in known}
    decays = known == [found(RESNET).decay(budget) for budget in ("0.5", "0.65")]
    yield says(
        f"The ResNet-8 is not timed, but for its decays on {batches} batches.",
        decays,
    )
    yield says(
        "They are empty where nothing was timed: on the ResNet-8, for all arms but the decays on "
        f"{batches} batches.",
        decays,
        all(found(name).all_know(SECONDS) for name in others),
    )


_BOTH = (FIXED, "decay 0.65")


def helps_nobody() -> Iterator[str]:
    """Yield where no schedule helps."""
    fixed = [arm for arm in found(VIT).arms if arm.startswith("fixed")]
    changing = [arm for arm in found(VIT).arms if found(VIT).changes(arm)]
    cut, decay = "cut to 0.7", "decay 0.7"
    yield says(
        "On the ResNets and on the table, corrected, no schedule is distinguishable from fixed low "
        "rank, and on the ViT none is better; on pretrained weights neither "
        f"{cuts(ENCODER, cut)} cut nor a decay is better than fewer steps.",
        not any(
            found(name).changes(arm)
            for name in (*RESNETS, TABLE)
            for arm in corrected_to_fixed(name)
        ),
        BETTER not in verbs(VIT, changing, *fixed),
        all(BETTER not in verbs(name, (cut, decay), "shorter, 0.7") for name in ENCODERS),
    )
    yield says(
        "Where memory is short: every schedule from full rank has at least its peak.",
        all(found(n).share(a, "memory_peak") > 0.99 for n in NARROWED for a in from_full(n)),
    )
    yield says(
        "On SST-2 from scratch, corrected, no arm is distinguishable from full rank: at half of "
        f"the FLOPs fixed low rank has {result(SST, HALF_FIXED)} %, a decay "
        f"{result(SST, 'decay 0.5')} and a narrower network {result(SST, HALF_NARROW)}, full rank "
        f"{result(SST, FULL)}.",
        not corrected(SST, FULL),
    )
    yield shorter_training()


def from_full(name: str) -> list[str]:
    """Return the arms that start at full rank and are cut."""
    return [arm for arm in found(name).arms if arm.startswith(("decay", "full first"))]


def shorter_training() -> str:
    """Return how shorter training at full rank compares with the decay of its FLOPs."""
    behind_shorter = {
        (name, arm.removesuffix(FEW))
        for name in (*NARROWED, *ENCODERS)
        for arm in found(name).arms
        if (shorter := f"shorter, {arm.removesuffix(FEW).removeprefix('decay ')}")
        in found(name).arms
        and (difference := found(name).difference(arm, shorter)) is not None
        and difference.mean < 0
    }
    return says(
        "Where a shorter training at full rank has run from scratch, it was, by the means, worse "
        "than the decay of its FLOPs at every budget, but for MRPC, the runs of "
        f"{longer(LONG, GPT)} times the steps and, at half of the FLOPs, the table; it was better "
        f"on all {NUMBERS[len(ENCODERS)]} tunings of the encoder.",
        behind_shorter
        == {
            *((name, "decay 0.7") for name in ENCODERS),
            *((SMALL_BERT, f"decay {budget}") for budget in ("0.5", "0.65")),
            (LONG, LONG_DECAY),
            *((LONG_MLP, f"decay {budget}") for budget in ("0.3", "0.5")),
            (TABLE, "decay 0.5"),
        },
    )


def others() -> Iterator[str]:
    """Yield what related methods and penalties give."""
    relora, lora = "ReLoRA", "LoRA from scratch"
    yield says(
        f"{relora} costs {share(MLP, relora)} of full rank on the MLP, {lora} costs "
        f"{share(MLP, lora)} of full rank on the MLP, and both end below it.",
        verbs(MLP, (relora, lora)) == {WORSE},
    )
    optimizers = ("GaLore", "APOLLO", "Fira")
    yield says(
        "GaLore, APOLLO and Fira save optimizer memory, which is little of a step's here, and no "
        f"FLOPs; of the {NUMBERS[len(optimizers)]} only Fira is not distinguishable from full rank "
        "on the GPT.",
        all(0.95 < found(GPT).share(arm, "memory_peak") < 1 for arm in optimizers),
        all(found(GPT).share(arm, "flops") == 1 for arm in optimizers),
        [verb(GPT, arm) for arm in optimizers] == [WORSE, WORSE, ALIKE],
    )
    soft = f"{LOW}, soft"
    (tried,) = {found(name).experiment.by_name["paper, svd, soft"].coefficients for name in _SOFT}
    yield says(
        f"(its coefficient tuned, from {_power(min(tried))} to {_power(max(tried))}) helped the "
        f"paper's order on the MLP of width 256: with the penalty it has {result(MLP, soft)} and "
        f"{verb(MLP, soft)} full rank, but the penalty's own products make it "
        f"{share(MLP, soft, ALL_FLOPS)} of full rank's FLOPs, and {share(MLP, soft, SECONDS)} of "
        f"its seconds; on the ResNet-8 it has {result(RESNET, soft)}, and it {verb(RESNET, soft)} "
        "full rank.",
        verb(MLP, soft, LOW) == BETTER,
    )


_SOFT = (MLP, RESNET)


def _power(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


def tunings() -> Iterator[str]:
    """Yield how arms were tuned."""
    experiments = {name: found(name).experiment for name in (*NARROWED, *ENCODERS)}
    seeds = [len(one.tuning) for one in experiments.values()]
    yield says(
        f"the best of {NUMBERS[min(map(rates_tried, experiments))]} or more, chosen on seeds and "
        "data that are not reported.",
        all(set(one.seeds).isdisjoint(one.tuning) for one in experiments.values()),
    )
    low = experiments[GPT].by_name[FIXED]
    yield (
        f"Fixed low rank alone also has the better of {NUMBERS[len(low.starts)]} starts (the "
        'truncated draw, or that with [its norm kept](methods/factors.md), marked "n") and of '
        f"{NUMBERS[len(low.decays)]} weight decays"
    )
    yield f"with {NUMBERS[max(len(one.seeds) for one in experiments.values())]} seeds only clear"
    yield f"{NUMBERS[min(seeds)]} to {NUMBERS[max(seeds)]} seeds chose the rates, in shorter runs"
    yield says(
        "full fine-tuning on RTE has the lowest of the rates tried.",
        {name for name in experiments if found(name).at_an_end} == {PAIRS[1]},
        found(PAIRS[1]).at_an_end == {FULL},
        min(one.rate for one in tuned(PAIRS[1], FULL)) == rate(PAIRS[1], FULL),
    )
    clipped = [name for name, one in experiments.items() if "clipped" in one.title]
    yield says("Gradients are clipped on the byte GPT alone:", clipped == [BYTE])
    few = experiments[GPT].by_name[DECAY].batches
    yield f"decays on {Problem.calibrated_on} and on {few} batches, and the pairs of times"
    yield (
        f"Where a problem has decays on {few} batches, the other arms calibrate on "
        f"{Problem.calibrated_on}."
    )


def machine() -> Iterator[str]:
    """Yield on what was measured, and how far seconds vary."""
    names = (*NARROWED, *ENCODERS)
    hardware = {run["hardware"] for n in names for a in found(n).arms.values() for run in a.runs}
    yield says(
        "one thread of an AMD EPYC for each run,",
        all(one.startswith("AMD EPYC") and one.endswith(", 1 thread") for one in hardware),
    )
    spreads = {name: _spread(name) for name in names}
    largest = max(spreads.pop(name) for name in (SMALL_BERT, LONG, LONG_MLP))
    yield says(
        "seconds of single runs vary by some hundredths, on MRPC from scratch and in the runs of "
        f"{longer(LONG, GPT)} times the steps by up to a {part(largest)}.",
        max(spreads.values()) < 0.07,
    )


def _spread(name: str) -> float:
    """Return the largest deviation of an arm's seconds over its runs, of full rank's."""
    arms = [one.timed for one in found(name).arms.values()]
    shares = [[run["cpu_seconds"] / run["full_rank_seconds"] for run in runs] for runs in arms]
    return max((stdev(values) for values in shares if len(values) > 1), default=0.0)


def arms() -> Iterator[str]:
    """Yield what the table of arms says of them."""
    budget = dict.fromkeys((GPT, BYTE, VIT, TABLE), "decay 0.5")
    (cut,) = {cuts(name, arm) for name, arm in budget.items()}
    yield (
        f"full rank, then {cut} cuts, half of the training FLOPs in all; calibrated on "
        f"{Problem.calibrated_on} batches"
    )
    first = "full first 0.5"
    time, cut = part(first_cut(GPT, first)), cuts(GPT, first)
    yield f"full rank for a {time} of the run, then {cut} cut |"
    yield f"else on {found(GPT).experiment.by_name[DECAY].batches} |"
