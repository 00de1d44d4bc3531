"""Choose a schedule: what it says in words, from the records of the evidence."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.training.harness.summary import ALL_FLOPS, CHEAP, FULL, SECONDS

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
    SST,
    TABLE,
    VIT,
    WIDE,
    WORSE,
    WRN,
    compared,
    corrected,
    corrected_to_fixed,
    cuts,
    first_cut,
    found,
    led,
    longer,
    share,
    verb,
    verbs,
    width,
)
from .words import NUMBERS, PARTS, part, says

PAGE = "docs/how-to/choose-a-schedule.md"
SETTINGS: tuple[str, ...] = ()
NO_RESULTS = (
    "If one of them is as good, you are done.",
    "say which of the two it is",
    "each layer to decide by its spectrum",
    '"Beat" is by the interval of one difference;',
    "## Make one from a budget",
    "Give `lr_scheduler=` to both if you have one:",
    "The same budget for each,",
    "If none of these fits,",
)


def claims() -> Iterator[str]:
    """Yield the sentences of the page."""
    yield from _costs()
    yield from _terms()
    yield from _small_gpt()
    yield from _larger_gpts()
    yield from _wide()
    yield from _narrow()
    yield from _vit()
    yield from _bert()
    yield _narrower()
    yield from _paper()
    yield from _convolutions()
    yield from _encoder()
    yield _seeds()


def _past(words: str) -> str:
    return words.replace("is ", "was ")


def _costs() -> Iterator[str]:
    quarters = [name for name in NARROWED if "fixed 1/4" in found(name).arms]
    yield says(
        "a quarter of the rank is more than a quarter of the FLOPs",
        all(found(name).share("fixed 1/4", "flops") > 1 / 4 for name in quarters),
    )
    yield says(
        "that share in all; at least full rank's peak memory",
        all(found(name).share(arm, "memory_peak") > 0.99 for name, arm in _decays().items()),
    )
    paper = [found(name).share(LOW, ALL_FLOPS) for name in NARROWED]
    yield says(
        "more than fixed low rank; in our runs up to a little more than full rank",
        min(paper) > CHEAP,
        1 < max(paper) < 1.2,
    )
    yield says(
        "plus a share of the rest; lower where weights are most of the memory",
        all(found(name).share("rotating", "memory_peak") < 0.9 for name in (MLP, TABLE)),
        found(GPT).share("rotating", "memory_peak") >= 1,
    )
    lora = [(name, arm) for name in ENCODERS for arm in found(name).arms if "LoRA" in arm]
    lora += [(name, arm) for name in (GPT, MLP, TABLE) for arm in ("ReLoRA", "LoRA from scratch")]
    yield says(
        "at least two thirds of full rank's FLOPs",
        all(found(name).share(arm, "flops") > 2 / 3 for name, arm in lora),
    )


def _decays() -> dict[str, str]:
    return {name: found(name).decay(budget) for name, budget in LARGEST.items()}


def _terms() -> Iterator[str]:
    seeds = sorted({len(found(name).experiment.seeds) for name in (*NARROWED, *ENCODERS)})
    few, many = (NUMBERS[number] for number in seeds)
    yield f"Every arm with its best learning rate, {few} or {many} seeds:"
    yield says(
        "on the largest GPT and the narrow MLP, what a decay won over fixed low rank does not "
        "stand a correction for comparing all arms.",
        *(verb(name, DECAY, FIXED) == BETTER for name in (MEDIUM, MLP)),
        *(DECAY not in corrected(name, FIXED) for name in (MEDIUM, MLP)),
    )


def _small_gpt() -> Iterator[str]:
    decays = {budget: found(GPT).decay(budget) for budget in ("0.5", "0.65")}
    others = {b: (f"fixed {b} FLOPs", f"shorter, {b}", f"narrower, {b}") for b in decays}
    yield says(
        "at half and at two thirds of the FLOPs a decay beat fixed low rank, shorter training and "
        "a narrower full-rank network of the same cost, and at half "
        f"{cuts(GPT, 'full first 0.5')} early cut too;",
        all(verbs(GPT, [decay], *others[budget]) == {BETTER} for budget, decay in decays.items()),
        verb(GPT, decays["0.5"], "full first 0.5") == BETTER,
    )


def _larger_gpts() -> Iterator[str]:
    larger, half = GPTS[1:], "decay 0.5"
    others = (HALF_FIXED, HALF_NARROW, "shorter, 0.5")
    short, long = (found(name).arms[FULL].runs[0]["steps"] for name in (GPT, LONG))
    yield says(
        f"on {NUMBERS[len(larger)]} larger GPTs it beat fixed low rank and the narrower network at "
        "two thirds. On the smaller of these half of the FLOPs were enough for the loss of full "
        f"rank, and there too it beat the {NUMBERS[len(others)]}. All are short runs; in "
        f"one of {NUMBERS[long // short]} times the steps a narrower network beat the small GPT's "
        "decay.",
        all(verbs(name, [found(name).decay("0.65")], FIXED, NARROW) == {BETTER} for name in larger),
        bool(found(BYTE).meets_full(half)),
        verbs(BYTE, [half], *others) == {BETTER},
        all(found(name).arms[FULL].runs[0]["steps"] <= short for name in GPTS),
        long % short == 0,
        verb(LONG, NARROW, LONG_DECAY) == BETTER,
    )
    yield f"runs of more than {long:,} steps: not measured"


def _wide() -> Iterator[str]:
    small, low = "fixed 1/16", "fixed 0.2 FLOPs"
    flops, time = (part(found(WIDE).share(small, cost)) for cost in (ALL_FLOPS, SECONDS))
    rank = PARTS[int(small.removeprefix("fixed 1/"))]
    yield (
        f"({width(WIDE)}): fixed low rank at a {rank} of the rank {_past(verb(WIDE, small))} full "
        f"rank, for a {flops} of the FLOPs and a {time} of the time;"
    )
    others = {
        FULL: "full rank",
        "narrower, 0.3": "a narrower network",
        "decay 0.2": "a decay of its training FLOPs",
        "decay 0.3": "a decay of half as many again",
    }
    yield says(
        f"at about a {part(found(WIDE).share(low, ALL_FLOPS))} of all FLOPs, with [decay of the "
        f"product](../methods/regularizers.md), it {_past(compared(WIDE, low, others))}.",
        found(WIDE).arms[low].runs[0]["setting"]["decay"] == "product",
    )


def _narrow() -> Iterator[str]:
    decays = {budget: found(MLP).decay(budget) for budget in ("0.5", "0.65")}
    yield says(
        f"({width(MLP)}): a decay beat fixed low rank from half of the FLOPs on, but not a "
        "narrower network;",
        all(verb(MLP, decay, f"fixed {b} FLOPs") == BETTER for b, decay in decays.items()),
        all(verb(MLP, decay, f"narrower, {b}") == ALIKE for b, decay in decays.items()),
    )
    first, eight, low = "full first 0.3", found(MLP).decay("0.3"), "fixed 0.3 FLOPs"
    early = f"`decay(total=..., cuts=[{first_cut(MLP, first):.1f}])`"
    yield says(
        f"at less {cuts(MLP, first)} early cut, {early}, beat both {cuts(MLP, eight)} cuts and "
        "fixed low rank, and was faster.",
        verbs(MLP, [first], eight, low) == {BETTER},
        all(found(MLP).share(first, SECONDS) < found(MLP).share(a, SECONDS) for a in (eight, low)),
    )
    yield says(
        f"In {longer(LONG_MLP, MLP)} times the steps, corrected, no arm was distinguishable from "
        "full rank.",
        not corrected(LONG_MLP, FULL),
    )


def _vit() -> Iterator[str]:
    (alike,) = verbs(VIT, (NARROW, HALF_NARROW, HALF_FIXED))
    yield (
        "a narrower network, and fixed low rank of half of the FLOPs, "
        f"{_past(alike).replace('was', 'were')} full rank."
    )
    larger, half = "decay 0.65", "decay 0.5"
    length = PARTS[round(1 / found(VIT).experiment.tuning_length)]
    yield says(
        "one of two thirds of the FLOPs was behind both, one of half behind fixed low rank only, "
        f"but rates were chosen in runs of {length} the length, and in those the larger decay was "
        "ahead of all three.",
        verbs(VIT, [larger], FIXED, NARROW) == {WORSE},
        verb(VIT, half, HALF_FIXED) == WORSE and verb(VIT, half, HALF_NARROW) == ALIKE,
        led() > 0,
    )


def _bert() -> Iterator[str]:
    (alike,) = verbs(SST, (HALF_NARROW, HALF_FIXED))
    yield (
        "a narrower network and fixed low rank of half of the FLOPs "
        f"{_past(alike).replace('was', 'were')} full rank; so there was little for a schedule to "
        "win."
    )


def _narrower() -> str:
    pairs = {name: f"narrower, {budget}" for name, budget in LARGEST.items()}

    def less(name: str, cost: str) -> bool:
        return found(name).share(pairs[name], cost) < found(name).share(_decays()[name], cost)

    return says(
        "takes less memory and, wherever that was timed, less time than a decay of its FLOPs.",
        all(less(name, "memory_peak") for name in NARROWED),
        all(less(name, SECONDS) for name in NARROWED if name != RESNET),
    )


def _paper() -> Iterator[str]:
    decays = _decays()
    yield says(
        "here with a low-rank ending, cost more than these and nowhere beat a narrower network.",
        all(
            found(n).share(LOW, ALL_FLOPS) > found(n).share(a, ALL_FLOPS) for n, a in decays.items()
        ),
        all(verb(name, LOW, f"narrower, {budget}") != BETTER for name, budget in LARGEST.items()),
    )
    experiment = found(GPT).experiment
    yield says(
        "On the small GPT it was better than fixed low rank of its FLOPs, but that had a setting "
        "tuned at a lower rank, and was itself worse than one of fewer FLOPs, from which the "
        "paper's order was not distinguishable.",
        verb(GPT, LOW, LIKE_LOW) == BETTER,
        experiment.tuned(experiment.by_name[LIKE_LOW]).name == "fixed 1/4",
        found(GPT).share("fixed 1/4", "flops") < found(GPT).share(LIKE_LOW, "flops"),
        found(GPT).share(FIXED, "flops") < found(GPT).share(LIKE_LOW, "flops"),
        verb(GPT, LIKE_LOW, FIXED) == WORSE and verb(GPT, LOW, FIXED) == ALIKE,
    )
    yield says(
        "On the ResNet-8 it was not better, on the narrow MLP, the ResNet-14 and the smaller GPT "
        "of bytes worse.",
        verb(RESNET, LOW, LIKE_LOW) == ALIKE,
        all(verb(name, LOW, LIKE_LOW) == WORSE for name in (BYTE, MLP, DEEPER)),
    )
    soft = f"{LOW}, soft"
    yield says(
        f"With an orthogonality penalty it {_past(verb(MLP, soft))} full rank on the narrow MLP, "
        "for more than its FLOPs and time.",
        all(found(MLP).share(soft, cost) > 1 for cost in (ALL_FLOPS, SECONDS)),
    )


def _convolutions() -> Iterator[str]:
    names = (*RESNETS, WRN)
    decays = {name: found(name).decay("0.65") for name in names}
    yield says(
        "full rank had the best mean; no schedule clearly beat fixed low rank of its FLOPs",
        all(found(name).best(found(name).arms) == FULL for name in names),
        not any(found(n).changes(arm) for n in names for arm in corrected_to_fixed(n)),
        all(verb(name, decays[name], FIXED) != BETTER for name in names),
    )
    yield says(
        "Neither beat a narrower network of somewhat fewer FLOPs, which was faster (the ResNet-8 "
        "is not timed) and on the WRN better than both;",
        all(BETTER not in verbs(name, (FIXED, decay), NARROW) for name, decay in decays.items()),
        all(0.5 < found(name).share(NARROW, "flops") < 0.6 for name in names),
        all(_faster(name, (FIXED, decays[name], LOW)) for name in names if name != RESNET),
        verbs(WRN, [NARROW], FIXED, "decay 0.65", LOW, LIKE_LOW) == {BETTER},
    )
    costs = (share(LARGER, arm) for arm in (LIKE_LOW, NARROW))
    (how,) = verbs(LARGER, [LIKE_LOW], NARROW)
    yield (f"fixed low rank of more FLOPs, {' to '.join(costs)}, {_past(how)} it on the ResNet-20.")


def _faster(name: str, others: tuple[str, ...]) -> bool:
    """Return whether the narrower network takes less time than others."""
    times = [found(name).share(arm, SECONDS) for arm in others]
    return found(name).share(NARROW, SECONDS) < min(times)


def _encoder() -> Iterator[str]:
    lora = "LoRA, rank 8", "LoRA by PEFT, rank 8"
    changed, shorter = ("cut to 0.7", "decay 0.7"), "shorter, 0.7"
    ours, peft = (_past(verb(ENCODER, arm)) for arm in lora)
    (cut,) = {cuts(name, changed[0]) for name in ENCODERS}
    yield says(
        f"tuned for a hundred steps: on STS-B LoRA here {ours} full fine-tuning, and PEFT's {peft} "
        f"it, for two thirds of its FLOPs; a decay and {cut} cut were worse.",
        all(found(name).arms[FULL].runs[0]["steps"] == 100 for name in ENCODERS),
        all(round(3 * found(ENCODER).share(arm, ALL_FLOPS)) == 2 for arm in lora),
        verbs(ENCODER, changed) == {WORSE},
    )
    mrpc, rte = PAIRS
    yield says(
        f"On MRPC LoRA was behind, on RTE a decay, {cut} cut and LoRA here, but not PEFT's.",
        verbs(mrpc, lora) == verbs(rte, (*changed, lora[0])) == {WORSE},
        verbs(mrpc, changed) == {verb(rte, lora[1])} == {ALIKE},
    )
    yield says(
        "Fewer steps of full fine-tuning cost as little, and were behind on STS-B only.",
        all(round(found(name).share(shorter, "flops"), 1) == 0.7 for name in ENCODERS),
        [verb(name, shorter) for name in (ENCODER, mrpc, rte)] == [WORSE, ALIKE, ALIKE],
    )


def _seeds() -> str:
    """Return what one seed shows."""
    lows = {name: f"fixed {budget} FLOPs" for name, budget in LARGEST.items()}
    apart = []
    for name, decay in _decays().items():
        one, low = (found(name).arms[arm] for arm in (decay, lows[name]))
        seeds = one.values.values()
        apart.append(max(seeds) - min(seeds) > abs(one.result - low.result))
    return (
        f"One seed shows nothing: on {sum(apart)} of the {len(apart)} problems trained from "
        "scratch the seeds of a decay differ by more than its mean does from that of fixed low "
        "rank."
    )
