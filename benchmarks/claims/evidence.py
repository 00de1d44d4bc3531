"""Evidence: for whom a schedule pays, and the answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from benchmarks.training.harness import statistics
from benchmarks.training.harness.comparison import tau
from benchmarks.training.harness.summary import ALL_FLOPS, CHEAP, FULL, Summaries
from benchmarks.training.harness.tables import around, digits, verdict

from .records import deviation, mean, read_lines, select

PAGE = "docs/evidence.md"
SETTINGS = (
    "95% intervals",
    "t-test at 5%",
    *("fixed 0.5 FLOPs", "narrower, 0.5", "shorter, 0.5", "decay 0.5", "full first 0.5"),
    "Is full rank met at 0.65 of its FLOPs?",
    "no more than 0.65 of all FLOPs",
    "a network of 0.6 or less",
    "The paper's order costs more than 0.65",
    "a decay at 0.65 of the FLOPs is",
    "mean that the 95% interval of that one difference is without zero",
    "bold where the 95% interval of this one difference",
    "the GPT of 10 million parameters",
    "Kendall's tau of the means; 1 is",
    "from 1e-5 to 1e-2",
    "decay of 0.65 cost a further",
    "of 408 and 277 test pairs",
    "at 80% of the run",
    "fixed low rank at 0.65, tuned by itself",
)
GPT, MLP, TABLE, RESNET = "gpt_characters", "mlp_256", "mlp_table", "resnet_fashion"
WIDE = "mlp_1024"
BYTE, MEDIUM, ENCODER, VIT = "gpt_bytes", "gpt_10m", "encoder_stsb", "vit_cifar"
PAIRS = "encoder_mrpc", "encoder_rte"
DEEPER, LARGER, SMALL_BERT, SST = "resnet_cifar", "resnet20_cifar", "bert_mrpc", "bert_sst2"
WRN = "wrn_cifar100"
DECAY, FIXED, NARROW = "decay 0.65, 8 batches", "fixed 0.65 FLOPs", "narrower, 0.65"
HALF_NARROW, HALF_FIXED = "narrower, 0.5", "fixed 0.5 FLOPs"
LOW, LIKE_LOW = "paper, low-rank ending", "fixed as paper, low-rank ending"


def claims() -> Iterator[str]:
    """Yield the sentences of the page."""
    yield from transformers()
    yield from perceptrons()
    yield from convolutions()
    yield from vit()
    yield from pretrained()
    yield from costs()
    yield from calibrations()
    yield from met()
    yield from helps_nobody()
    corrections()
    orders()


def transformers() -> Iterator[str]:
    """Yield what the GPTs say."""
    assert len({verb(GPT, DECAY, other) for other in (FIXED, NARROW, "shorter, 0.65")}) == 1
    yield (
        f"{verb(GPT, DECAY, FIXED)} fixed low rank, a narrower network and shorter training, and "
        f"{verb(GPT, DECAY)} full rank."
    )
    decay, half = "decay 0.65", "decay 0.5"
    (better,) = {verb(BYTE, decay, other) for other in (FULL, FIXED, NARROW, "shorter, 0.65")}
    yield (
        f"On the byte GPT it {better} full rank, by {behind(BYTE, FULL, decay)}, and than all "
        f"three, and a decay at {share(BYTE, half)} {verb(BYTE, half)} full rank and {better} "
        "those three at half of the FLOPs."
    )
    halves = (HALF_FIXED, HALF_NARROW, "shorter, 0.5")
    assert {verb(BYTE, half, other) for other in halves} == {better}
    assert verb(MEDIUM, DECAY, FIXED) == verb(MEDIUM, DECAY, NARROW)
    yield (
        f"it {verb(MEDIUM, DECAY, FIXED)} fixed low rank and the narrower network, and "
        f"{verb(MEDIUM, DECAY)} full rank, for {share(MEDIUM, DECAY, 'cpu_seconds')} of its CPU "
        "seconds."
    )
    runs = read_lines("training/results/2026-11-30-byte-gpt-rates/runs.jsonl")
    without = {
        arm: [run["result"]["loss"] for run in select(runs, arm=arm, part="test")
              if run["setting"]["rate"] == 0.25]
        for arm in (FULL, decay)
    }  # fmt: skip
    first, second = (f"{mean(v):.3f} ± {deviation(v):.3f}" for v in without.values())
    yield f"full rank had {first} and a decay {second}"


def perceptrons() -> Iterator[str]:
    """Yield what the MLP says."""
    yield (
        f"a decay {verb(MLP, DECAY, FIXED)} fixed low rank of its FLOPs but "
        f"{verb(MLP, DECAY, NARROW)} a narrower network of them."
    )
    first, eight = "full first 0.3", found(MLP).decay("0.3")
    yield (
        f"One early cut at {share(MLP, first)} has {result(MLP, first)} % and "
        f"{verb(MLP, first, eight)} a decay of the same FLOPs;"
    )
    one = "Pufferfish"
    yield f"a new warm-up, has {result(MLP, one)} at {share(MLP, one, ALL_FLOPS)}."
    low, narrow, decay = "fixed 0.2 FLOPs", "narrower, 0.2", "decay 0.2"
    assert verb(WIDE, low) == verb(WIDE, low, narrow) == verb(WIDE, low, decay)
    small = "fixed 1/16"
    yield (
        f"at 1/16 of the rank has {result(WIDE, small)} % and {verb(WIDE, small)} full rank, "
        f"{result(WIDE, FULL)}, for {share(WIDE, small, ALL_FLOPS)} of its FLOPs, "
        f"{share(WIDE, small, 'cpu_seconds')} of its CPU seconds and "
        f"{share(WIDE, small, 'memory_peak')} of its memory."
    )
    yield (
        f"At {share(WIDE, low)} of the training FLOPs, {share(WIDE, low, ALL_FLOPS)} with those of "
        f"decaying products, it has {result(WIDE, low)} and {verb(WIDE, low)} full rank, a "
        f"narrower network and a decay, for {share(WIDE, low, 'cpu_seconds')} of the seconds and "
        f"{share(WIDE, low, 'memory_peak')} of the memory. A decay {verb(WIDE, decay)} full rank "
        f"and {verb(WIDE, decay, narrow)} the narrower network."
    )
    for name, arms in {MLP: (NARROW, FIXED), WIDE: (low, narrow)}.items():
        better, worse = (found(name).arms[arm].result for arm in arms)
        assert better > worse


def convolutions() -> Iterator[str]:
    """Yield what the ResNets say."""
    decay = found(LARGER).decay("0.65")
    yield (
        f"On the ResNet-20 a narrower network at {share(LARGER, NARROW)} of the FLOPs has "
        f"{result(LARGER, NARROW)} %, fixed low rank at {share(LARGER, FIXED)} "
        f"{result(LARGER, FIXED)}, a decay {result(LARGER, decay)}: each "
        f"{verb(LARGER, decay)} full rank, {result(LARGER, FULL)}."
    )
    assert len({verb(LARGER, arm) for arm in (NARROW, FIXED, decay)}) == 1
    for other in (FIXED, NARROW):
        assert verb(LARGER, decay, other) == verb(DEEPER, decay, other)
    yield (
        f"A decay {verb(LARGER, decay, FIXED)} fixed low rank and {verb(LARGER, decay, NARROW)} "
        "the narrower network there and on the ResNet-14;"
    )
    yield from wrn()
    for name in (RESNET, DEEPER, LARGER):
        assert found(name).best(found(name).arms) == FULL
        others = (verb(name, arm, NARROW) for arm in (FIXED, found(name).decay("0.65"), LOW))
        assert "is better than" not in others
    assert [place(name) for name in (RESNET, DEEPER, LARGER)] == [5, 5, 2]
    yield (
        f"second on the ResNet-20 by its mean, for {share(LARGER, LOW, ALL_FLOPS)} of the FLOPs, "
        f"where fixed low rank of those has {result(LARGER, LIKE_LOW)} and "
        f"{verb(LARGER, LIKE_LOW, NARROW)} the narrower network of {share(LARGER, NARROW)}."
    )


def wrn() -> Iterator[str]:
    """Yield what the WRN says."""
    decay = "decay 0.65"
    low = (decay, LOW, FIXED)
    difference = behind(WRN, NARROW)
    yield (
        f"On a WRN-16-4 on CIFAR-100 (n = {found(WRN).arms[decay].n}) a narrower network at "
        f"{share(WRN, NARROW)} of the FLOPs has {result(WRN, NARROW)} %, {difference} behind full "
        f"rank, {result(WRN, FULL)}, for {share(WRN, NARROW, 'cpu_seconds')} of its seconds;"
    )
    assert {verb(WRN, arm, other) for arm in low for other in (FULL, NARROW)} == {"is worse than"}
    pairs = ((decay, LOW), (decay, FIXED), (LOW, FIXED))
    assert {verb(WRN, *pair) for pair in pairs} == {"is not distinguishable from"}
    yield (
        f"a decay has {result(WRN, decay)}, the paper's order {result(WRN, LOW)}, fixed low rank "
        f"{result(WRN, FIXED)}: each {verb(WRN, decay)} both, and none is distinguishable from "
        f"another, for {share(WRN, decay, 'cpu_seconds')} to {share(WRN, LOW, 'cpu_seconds')} of "
        "the seconds; fixed low rank of the FLOPs of the paper's order has "
        f"{result(WRN, LIKE_LOW)} and {verb(WRN, LIKE_LOW, LOW)} it."
    )
    assert found(WRN).best(found(WRN).arms) == FULL


def place(name: str) -> int:
    """Return the place of the paper's order among the main arms, by their means; 1 is the best."""
    results = found(name).arms
    main = [FULL, NARROW, FIXED, found(name).decay("0.65"), LOW]
    return sorted(main, key=lambda arm: -results[arm].result).index(LOW) + 1


def vit() -> Iterator[str]:
    """Yield what the ViT says."""
    fixed = "fixed 0.5 FLOPs"
    yield (
        f"Fixed low rank at {share(VIT, fixed)} of the FLOPs has {result(VIT, fixed)} % and "
        f"{verb(VIT, fixed)} full rank;"
    )
    decay = "decay 0.65"
    assert verb(VIT, decay) == verb(VIT, decay, FIXED) == verb(VIT, decay, NARROW)
    half = "decay 0.5"
    yield (
        f"a decay at {share(VIT, decay)} {verb(VIT, decay)} full rank and both of them, one at "
        f"{share(VIT, half, ALL_FLOPS)} {verb(VIT, half, fixed)} fixed low rank only."
    )
    assert "is worse than" not in (verb(VIT, half), verb(VIT, half, "narrower, 0.5"))


def pretrained() -> Iterator[str]:
    """Yield what the encoder says."""
    ours, peft = "LoRA, rank 8", "LoRA by PEFT, rank 8"
    cut, decay, shorter = "cut to 0.7", "decay 0.7", "shorter, 0.7"
    yield (
        f"reaches a correlation of {result(ENCODER, ours)} with LoRA of rank 8 here and "
        f"{result(ENCODER, peft)} with PEFT's, {result(ENCODER, FULL)} with full "
        f"fine-tuning, for {share(ENCODER, ours)} of its FLOPs and "
        f"{share(ENCODER, ours, 'memory_peak')} of its memory."
    )
    assert verb(ENCODER, cut) == verb(ENCODER, decay)
    yield (
        f"before the first step has {result(ENCODER, cut)}, a decay {result(ENCODER, decay)}: each "
        f"{verb(ENCODER, decay)} full fine-tuning, and the decay {verb(ENCODER, decay, shorter)} "
        f"full fine-tuning for fewer steps, {result(ENCODER, shorter)}."
    )
    mrpc, rte = PAIRS
    (lora,) = {verb(mrpc, arm) for arm in (ours, peft)}
    (others,) = {verb(mrpc, arm).replace("is ", "are ") for arm in (cut, decay, shorter)}
    yield f"On MRPC LoRA {lora} full fine-tuning, and one cut, a decay and fewer steps {others} it;"
    (alike,) = {verb(rte, arm).replace("is ", "are ") for arm in (peft, shorter)}
    (worse,) = {verb(rte, arm).replace("is ", "are ") for arm in (ours, cut, decay)}
    yield f"on RTE PEFT's LoRA and fewer steps {alike} it, LoRA here, one cut and a decay {worse}"
    (n,) = {found(name).arms[FULL].n for name in PAIRS}
    yield f"(n = {n}, of"
    further = {f"{found(name).further(decay):.1f}" for name in (ENCODER, *PAIRS)}
    assert further == {"0.3"}
    yield f"costs a further {found(ENCODER).further(decay):.2f} of a tuning this short"


def costs() -> Iterator[str]:
    """Yield what memory and seconds say."""
    yield (
        f"On the character GPT the narrower network takes {share(GPT, NARROW, 'memory_peak')} of "
        f"full rank's memory and {share(GPT, NARROW, 'cpu_seconds')} of its CPU seconds, "
        f"the decay of {share(GPT, DECAY)} takes {share(GPT, DECAY, 'memory_peak')} and "
        f"{share(GPT, DECAY, 'cpu_seconds')}, fixed low rank {share(GPT, FIXED, 'memory_peak')} "
        f"and {share(GPT, FIXED, 'cpu_seconds')}:"
    )
    assert round(6 * (1 - found(MEDIUM).share(FIXED, "memory_peak"))) == 1
    for name in (GPT, BYTE, RESNET, DEEPER, LARGER, VIT, SMALL_BERT, SST):
        assert found(name).share(FIXED, "memory_peak") > 0.95
    for name, arm in {MLP: FIXED, TABLE: FIXED, WIDE: "fixed 0.3 FLOPs"}.items():
        assert found(name).share(arm, "memory_peak") < 0.8
    for name in (GPT, BYTE, MEDIUM, MLP, RESNET, DEEPER, LARGER, WRN, VIT, SMALL_BERT, SST):
        assert found(name).share(NARROW, "cpu_seconds") < 0.95
    for arm in ("narrower, 0.3", "fixed 0.3 FLOPs", "decay 0.3"):
        assert found(WIDE).share(arm, "cpu_seconds") < 0.7
    for arm in (FIXED, "decay 0.65"):
        assert round(5 * (1 - found(WRN).share(arm, "cpu_seconds"))) == 1
    for name in (RESNET, DEEPER, LARGER, VIT):
        for arm in (FIXED, found(name).decay("0.65"), LOW):
            assert found(name).share(arm, "cpu_seconds") > 0.9


def calibrations() -> Iterator[str]:
    """Yield what calibration costs on more and on fewer batches."""
    many, few = (
        [f"{found(name).further(arm):.2f}" for name in (GPT, MLP, RESNET)]
        for arm in ("decay 0.65", DECAY)
    )
    yield (
        f"cost a further {many[0]} of full rank's training on the character GPT, {many[1]} on the "
        f"MLP of width 256 and {many[2]} on the ResNet-8"
    )
    assert {verb(name, DECAY, "decay 0.65") for name in (GPT, MLP, RESNET)} == {
        "is not distinguishable from"
    }
    yield f"with 8, which is the default, {few[0]}, {few[1]} and {few[2]}, and the results"


def met() -> Iterator[str]:
    """Yield who is on the front, who meets full rank, and what inflation was worth."""
    for name in (GPT, BYTE, MEDIUM, MLP, RESNET, DEEPER, LARGER, WRN, VIT, SST):
        assert any(arm.startswith("narrower") for arm in found(name).front())
    assert {arm.partition(" ")[0] for arm in found(WIDE).front()} == {"fixed"}
    beside = {name: "0.65" for name in (GPT, BYTE, MEDIUM, MLP, RESNET, DEEPER, LARGER, WRN, VIT)}
    beside[SST] = "0.65"
    fewer = [
        found(name).share(found(name).decay(budget), "flops")
        - found(name).share(f"narrower, {budget}", "flops")
        for name, budget in {**beside, WIDE: "0.3", TABLE: "0.65", SMALL_BERT: "0.65"}.items()
    ]
    assert min(fewer) >= 0
    yield f"narrower networks up to {max(fewer):.1f} of full rank's fewer"
    assert not any(found(name).meets_full(arm) for name in (GPT, MEDIUM) for arm in cheap(name))
    assert found(MEDIUM).meets_full(DECAY)
    half = "decay 0.5"
    assert found(BYTE).meets_full(half) and found(BYTE).cheap(half)
    yield f"On the byte GPT yes, by a decay at {share(BYTE, half, ALL_FLOPS)}, which ends at"
    yield f"ends at {share(BYTE, half, 'end_flops')} of full rank's FLOPs a step;"
    difference = behind(GPT, DECAY).replace(" (", " behind, ").removesuffix(")")
    yield (
        f"(a decay comes near, {difference}, at {share(GPT, DECAY, ALL_FLOPS)}), and on the "
        f"largest GPT one meets it for {share(MEDIUM, DECAY, ALL_FLOPS)} in all"
    )
    images = (MLP, RESNET, DEEPER, LARGER, VIT)
    assert [n for n in images if any(schedule(n, arm) for arm in cheap(n))] == [VIT]
    for name in (SMALL_BERT, SST, TABLE):
        assert any(schedule(name, arm) for arm in cheap(name))
    none = (MEDIUM, LARGER, WRN, ENCODER, *PAIRS)
    assert not any(found(name).changes(arm) for name in none for arm in cheap(name))
    two = [arm for arm in cheap(WIDE) if schedule(WIDE, arm) and arm.startswith("decay")]
    assert two == ["decay 0.2", "decay 0.3"]
    for name in (DEEPER, LARGER, WRN):
        assert verb(name, found(name).decay("0.65")) == "is worse than"
    assert verb(GPT, LOW, LIKE_LOW) == verb(GPT, DECAY, LOW) == "is better than"
    assert verb(GPT, LOW, FIXED) == "is not distinguishable from"
    assert verb(MLP, LOW, LIKE_LOW) == verb(DEEPER, LOW, LIKE_LOW) == "is worse than"
    assert verb(BYTE, LOW, LIKE_LOW) == verb(BYTE, LOW, FIXED)
    yield (
        f"On the byte GPT the paper's order {verb(BYTE, LOW, FIXED)} fixed low rank of its FLOPs, "
        f"and of {share(BYTE, FIXED)} of"
    )
    others = (verb(name, LOW, LIKE_LOW) for name in (RESNET, LARGER, WRN, VIT, SMALL_BERT, SST))
    assert set(others) == {"is not distinguishable from"}
    paper = (GPT, BYTE, MEDIUM, MLP, WIDE, TABLE, RESNET, DEEPER, LARGER, WRN, VIT, SMALL_BERT, SST)
    for name in paper:
        inflated, before, _ = around(found(name).arms[LOW])
        assert inflated < before and found(name).share(LOW, ALL_FLOPS) > CHEAP


def cheap(name: str) -> list[str]:
    """Return the arms that cost few FLOPs and end at few."""
    return [arm for arm in found(name).arms if found(name).cheap(arm)]


def schedule(name: str, arm: str) -> bool | None:
    """Return whether an arm changes layers in training and meets full rank."""
    return found(name).changes(arm) and found(name).meets_full(arm)


def helps_nobody() -> Iterator[str]:
    """Yield where no schedule helps."""
    shortened = {name: "0.65" for name in (GPT, BYTE, MLP, VIT, RESNET, DEEPER, TABLE, SMALL_BERT)}
    shortened[SST] = "0.65"
    shortened |= {WIDE: "0.3", **dict.fromkeys((ENCODER, *PAIRS), "0.7")}
    for name, budget in shortened.items():
        ahead = found(name).difference(found(name).decay(budget), f"shorter, {budget}")
        assert ahead is not None
        assert (ahead.mean > 0) == (name not in (SMALL_BERT, ENCODER, *PAIRS))
    yield (
        f"at half of the FLOPs fixed low rank has {result(SST, HALF_FIXED)} %, a decay "
        f"{result(SST, 'decay 0.5')} and a narrower network {result(SST, HALF_NARROW)}, full rank "
        f"{result(SST, FULL)}."
    )
    for arm in ("ReLoRA", "LoRA from scratch"):
        yield f"{arm} costs {share(MLP, arm)} of full rank on the MLP"
    soft = f"{LOW}, soft"
    yield f"with the penalty it has {result(MLP, soft)} and {verb(MLP, soft)} full rank, but"
    yield (
        f"own products make it {share(MLP, soft, ALL_FLOPS)} of full rank's FLOPs, and "
        f"{share(MLP, soft, 'cpu_seconds')} of its seconds;"
    )
    yield f"on the ResNet-8 it has {result(RESNET, soft)}, and it {verb(RESNET, soft)} full rank"


def orders() -> None:
    """Check that the order of the arms of the smaller BERT problem turns on the larger."""
    small, large = (found(name).arms for name in (SMALL_BERT, SST))
    both = [arm for arm in small if arm in large]
    assert tau([small[arm].result for arm in both], [large[arm].result for arm in both]) < -0.3


def corrections() -> None:
    """Check which differences remain with Holm's correction."""
    for name, arm in {GPT: DECAY, BYTE: "decay 0.65"}.items():
        assert all(arm in corrected(name, other) for other in (FIXED, NARROW))
    assert "decay 0.5" in corrected(BYTE, FIXED) and "decay 0.65" in corrected(BYTE, FULL)
    assert DECAY in corrected(MEDIUM, NARROW) and DECAY not in corrected(MEDIUM, FIXED)
    assert DECAY not in corrected(MLP, FIXED)
    assert not any("decay 0.65" in corrected(VIT, other) for other in (FULL, FIXED, NARROW))
    assert not any("LoRA" in arm for name in PAIRS for arm in corrected(name, FULL))
    assert {"cut to 0.7", "decay 0.7"} <= set(corrected(PAIRS[1], FULL))
    assert not corrected(TABLE, FULL) and not corrected(SST, FULL)
    assert all(verdict(found(name)).startswith("No arm") for name in (RESNET, TABLE, LARGER))


def corrected(name: str, other: str) -> list[str]:
    """Return the arms that differ from another, with Holm's correction for all arms."""
    pairs = {arm: found(name).difference(arm, other) for arm in found(name).arms if arm != other}
    return statistics.corrected({arm: one for arm, one in pairs.items() if one is not None})


@cache
def found(name: str) -> Summaries:
    """Return the runs of an experiment."""
    return Summaries(name)


def result(name: str, arm: str) -> str:
    """Return mean and deviation of an arm's results."""
    return found(name).arms[arm].text(digits(found(name)))


def share(name: str, arm: str, cost: str = "flops") -> str:
    """Return an arm's cost, relative to full rank."""
    return f"{found(name).share(arm, cost):.2f}"


def behind(name: str, arm: str, other: str = FULL) -> str:
    """Return by how much an arm is worse than another, with the standard error."""
    difference = found(name).difference(arm, other)
    assert difference is not None
    places = digits(found(name))
    return f"{-difference.mean:.{places}f} (s.e. {difference.error:.{places}f})"


def verb(name: str, arm: str, other: str = FULL) -> str:
    """Return how an arm compares with another, by the 95% interval of their difference."""
    difference = found(name).difference(arm, other)
    assert difference is not None
    if difference.low > 0:
        return "is better than"
    return "is worse than" if difference.high < 0 else "is not distinguishable from"
