"""Evidence: for whom a schedule pays, and the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from statistics import fmean

from benchmarks.training.harness import statistics, tuning
from benchmarks.training.harness.arm import Setting
from benchmarks.training.harness.comparison import LIKE, same_order
from benchmarks.training.harness.jobs import as_run
from benchmarks.training.harness.store import Store
from benchmarks.training.harness.summary import ALL_FLOPS, CHEAP, FEW, FULL, Summaries
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
BETTER = "is better than"


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
    yield from orders()
    corrections()


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
    first, second = (
        (f"{mean(v):.3f} ± {deviation(v):.3f}", len(v)) for v in map(unclipped, (FULL, decay))
    )
    yield f"full rank had {first[0]} (n = {first[1]}) and a decay {second[0]} (n = {second[1]};"
    yield from largest_gpt()


def unclipped(arm: str) -> list[float]:
    """Return the test losses of the byte GPT without clipping, at the one rate that both have."""
    runs = read_lines("training/results/2026-11-30-byte-gpt-rates/runs.jsonl")
    of_arm = select(runs, arm=arm, part="test")
    return [run["result"]["loss"] for run in of_arm if run["setting"]["rate"] == 0.25]


def largest_gpt() -> Iterator[str]:
    """Yield how the rates of the largest GPT were chosen, and when its decay is ahead."""
    assert "clipped" in found(BYTE).experiment.title
    assert "clipped" not in found(MEDIUM).experiment.title
    decays = {DECAY, "decay 0.65"}
    (mine,) = {rate(MEDIUM, arm) for arm in decays}
    (others,) = {rate(MEDIUM, arm) for arm in found(MEDIUM).arms if arm not in decays}
    yield (
        f"one seed chose its rates in {steps_of_tuning()} steps: {mine:g} of the problem's own for "
        f"the decay, {others:g} for all others."
    )
    losses = dict(sorted((one.rate, -result) for one, result in tuned(MEDIUM, FULL).items()))
    texts, rates = [f"{loss:.3f}" for loss in losses.values()], [f"{one:g}" for one in losses]
    first, second, third, last = losses.values()
    assert second < first and second < third and last < third
    yield f"go up and down, {listed(texts)} at rates of {listed(rates)}."
    leads = [f"{lead:.3f}" for lead in (ahead(50), ahead(200), ahead(400))]
    yield (
        f"leads full rank in validation by {leads[0]} at step 50, {leads[1]} at 200 and {leads[2]} "
        "at the end"
    )


def steps_of_tuning() -> int:
    """Return for how many steps the one run trains that tries a rate of the largest GPT."""
    assert len(found(MEDIUM).experiment.tuning) == 1
    steps = found(MEDIUM).arms[FULL].runs[0]["steps"]
    return round(found(MEDIUM).experiment.tuning_length * steps)


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
    low, small = "fixed 0.2 FLOPs", "fixed 1/16"
    yield (
        f"at 1/16 of the rank has {result(WIDE, small)} % and {verb(WIDE, small)} full rank, "
        f"{result(WIDE, FULL)}, for {share(WIDE, small, ALL_FLOPS)} of its FLOPs, "
        f"{share(WIDE, small, 'cpu_seconds')} of its CPU seconds and "
        f"{share(WIDE, small, 'memory_peak')} of its memory."
    )
    yield (
        f"At {share(WIDE, low)} of the training FLOPs, {share(WIDE, low, ALL_FLOPS)} with those of "
        f"decaying products, it has {result(WIDE, low)}, for {share(WIDE, low, 'cpu_seconds')} of "
        f"the seconds and {share(WIDE, low, 'memory_peak')} of the memory."
    )
    kinds = {
        "narrower, 0.3": "a narrower network",
        "full first 0.2": "one early cut",
        "decay 0.2": "a decay",
        "decay 0.3": "a decay",
    }
    at = {arm: f"{words} at {share(WIDE, arm, ALL_FLOPS)}" for arm, words in kinds.items()}
    yield f"It {compared(WIDE, low, {FULL: 'full rank', **at})}."
    both = {"0.2": "The decay at", "0.3": "that at"}
    sentences = (
        f"{words} {share(WIDE, f'decay {budget}', ALL_FLOPS)} "
        + compared(WIDE, f"decay {budget}", {
            FULL: "full rank",
            (narrow := f"narrower, {budget}"): f"a narrower network at {share(WIDE, narrow)}",
        })
        for budget, words in both.items()
    )  # fmt: skip
    yield f"{'; '.join(sentences)}."
    for name, arms in {MLP: (NARROW, FIXED), WIDE: (low, "narrower, 0.2")}.items():
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
        f"{verb(VIT, fixed)} full rank."
    )
    decay = "decay 0.65"
    assert verb(VIT, decay) == verb(VIT, decay, FIXED) == verb(VIT, decay, NARROW)
    half = "decay 0.5"
    yield (
        f"At {share(VIT, decay, ALL_FLOPS)} it {verb(VIT, decay)} full rank, by "
        f"{behind(VIT, decay)}, than a narrower network and than fixed low rank, one at "
        f"{share(VIT, half, ALL_FLOPS)} {verb(VIT, half, fixed)} fixed low rank only."
    )
    assert "is worse than" not in (verb(VIT, half), verb(VIT, half, "narrower, 0.5"))
    assert (len(found(VIT).experiment.tuning), found(VIT).experiment.tuning_length) == (2, 0.5)
    yield f"In those the larger decay led full rank by {led():.2f} points;"
    assert found(VIT).best((half, decay)) == half


def led() -> float:
    """Return by how much the ViT's larger decay led full rank in the runs that chose the rates."""
    decay, full = (max(tuned(VIT, arm).values()) for arm in ("decay 0.65", FULL))
    assert all(decay > max(tuned(VIT, arm).values()) for arm in (NARROW, FIXED, HALF_FIXED))
    return decay - full


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
    for name in (GPT, BYTE, MEDIUM, MLP, DEEPER, LARGER, WRN, VIT, SMALL_BERT, SST):
        assert found(name).share(NARROW, "cpu_seconds") < 0.95
    for arm in ("narrower, 0.3", "fixed 0.3 FLOPs", "decay 0.3"):
        assert found(WIDE).share(arm, "cpu_seconds") < 0.7
    for arm in (FIXED, "decay 0.65"):
        assert round(5 * (1 - found(WRN).share(arm, "cpu_seconds"))) == 1
    for name in (DEEPER, LARGER, VIT):
        for arm in (FIXED, found(name).decay("0.65"), LOW):
            assert found(name).share(arm, "cpu_seconds") > 0.9
    known = [arm for arm in found(RESNET).arms if found(RESNET).knows(arm, "cpu_seconds")]
    assert known == ["decay 0.5, 8 batches", DECAY]  # the page says that the others are not timed


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
    on_images = {
        name: [f"“{arm}”" for arm in cheap(name) if schedule(name, arm)]
        for name in (MLP, WIDE, RESNET, DEEPER, LARGER, WRN, VIT)
    }
    assert {name for name, arms in on_images.items() if arms} == {WIDE, VIT}
    assert any(arm.startswith("fixed") and found(WIDE).meets_full(arm) for arm in cheap(WIDE))
    yield f"on the MLP of width 1024 ({', '.join(on_images[WIDE])}), as fixed low rank does,"
    (one,) = on_images[VIT]
    yield f"and one on the ViT ({one}), within its noise;"
    for name in (SMALL_BERT, SST, TABLE):
        assert any(schedule(name, arm) for arm in cheap(name))
    none = (MEDIUM, LARGER, WRN, ENCODER, *PAIRS)
    assert not any(found(name).changes(arm) for name in none for arm in cheap(name))
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
    encoders = (ENCODER, *PAIRS)
    scratch = (GPT, BYTE, MLP, WIDE, VIT, RESNET, DEEPER, TABLE, SMALL_BERT, SST)
    behind_shorter = {
        (name, arm.removesuffix(FEW))
        for name in (*scratch, *encoders)
        for arm in found(name).arms
        if (shorter := f"shorter, {arm.removesuffix(FEW).removeprefix('decay ')}")
        in found(name).arms
        and (difference := found(name).difference(arm, shorter)) is not None
        and difference.mean < 0
    }
    assert behind_shorter == {
        *((name, "decay 0.7") for name in encoders),
        *((SMALL_BERT, f"decay {budget}") for budget in ("0.5", "0.65")),
        (TABLE, "decay 0.5"),
    }
    for name in encoders:
        assert all(verb(name, arm, "shorter, 0.7") != BETTER for arm in ("cut to 0.7", "decay 0.7"))
    fixed = [arm for arm in found(VIT).arms if arm.startswith("fixed")]
    changing = [arm for arm in found(VIT).arms if found(VIT).changes(arm)]
    assert not any(verb(VIT, arm, low) == BETTER for arm in changing for low in fixed)
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
    assert taus[SMALL_BERT, SST] < -0.3


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


def rate(name: str, arm: str) -> float:
    """Return the learning rate that was chosen for an arm, as a factor of the problem's own."""
    return found(name).arms[arm].runs[0]["setting"]["rate"]


def tuned(name: str, arm: str) -> dict[Setting, float]:
    """Return what an arm's settings gave in the runs that chose one, by means; larger is better."""
    experiment = found(name).experiment
    runs = Store(name).runs()
    lead = as_run(experiment.by_name[arm], experiment, runs, "valid")
    assert lead is not None
    every = tuning.found(lead, runs, experiment.metric, experiment.higher, experiment.tuning)
    return {setting: fmean(results.values()) for setting, results in every.items()}


def listed(words: Sequence[str]) -> str:
    """Return words as they are listed in a sentence."""
    return " and ".join([*filter(None, [", ".join(words[:-1])]), words[-1]])


def compared(name: str, arm: str, others: Mapping[str, str]) -> str:
    """Return how an arm compares with others, which are given with their words."""
    verbs: dict[str, list[str]] = {}
    for other, words in others.items():
        verbs.setdefault(verb(name, arm, other), []).append(words)
    return ", and ".join(f"{how} {listed(words)}" for how, words in verbs.items())


def verb(name: str, arm: str, other: str = FULL) -> str:
    """Return how an arm compares with another, by the 95% interval of their difference."""
    difference = found(name).difference(arm, other)
    assert difference is not None
    if difference.low > 0:
        return BETTER
    return "is worse than" if difference.high < 0 else "is not distinguishable from"
