"""Evidence: for whom a schedule pays, and the answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from benchmarks.training.harness.summary import ALL_FLOPS, CHEAP, FULL, Summaries
from benchmarks.training.harness.tables import around, digits, verdict

PAGE = "docs/evidence.md"
SETTINGS = (
    "95% intervals",
    "t-test at 5%",
    *("fixed 0.5 FLOPs", "narrower, 0.5", "shorter, 0.5", "decay 0.5", "full first 0.5"),
    "Is full rank met at 0.65 of its FLOPs?",
    "no more than 0.65 of the FLOPs",
    "a network of 0.6 or less",
    "The paper's order costs more than 0.65",
    "a decay at 0.65 of the FLOPs is",
    "a decay of 0.65 spends a little more with calibration",
    "bold where the 95% interval of this one difference",
    "the GPT of 10 million parameters",
    "Kendall's tau of the means; 1 is",
    "from 1e-5 to 1e-2",
    "decay of 0.65 cost a further",
    "of 408 and 277 test pairs",
)
GPT, MLP, TABLE, RESNET = "gpt_characters", "mlp_256", "mlp_table", "resnet_fashion"
WIDE = "mlp_1024"
BYTE, MEDIUM, ENCODER, VIT = "gpt_bytes", "gpt_10m", "encoder_stsb", "vit_cifar"
PAIRS = "encoder_mrpc", "encoder_rte"
DEEPER, LARGER, SMALL_BERT = "resnet_cifar", "resnet20_cifar", "bert_mrpc"
DECAY, FIXED, NARROW = "decay 0.65, 8 batches", "fixed 0.65 FLOPs", "narrower, 0.65"
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
        f"three, and a decay at {share(BYTE, half)} {verb(BYTE, half)} full rank."
    )
    assert verb(MEDIUM, DECAY, FIXED) == verb(MEDIUM, DECAY, NARROW)
    yield (
        f"in a short run, it {verb(MEDIUM, DECAY, FIXED)} fixed low rank and the narrower "
        f"network, and {verb(MEDIUM, DECAY)} full rank, for {share(MEDIUM, DECAY, 'cpu_seconds')} "
        "of its CPU seconds."
    )


def perceptrons() -> Iterator[str]:
    """Yield what the MLP says."""
    yield (
        f"a decay {verb(MLP, DECAY, FIXED)} fixed low rank of its FLOPs but "
        f"{verb(MLP, DECAY, NARROW)} a narrower network of them."
    )
    first, eight = "full first 0.3", found(MLP).decay("0.3")
    yield (
        f"One early cut at {share(MLP, first)} has {result(MLP, first)} % and "
        f"{verb(MLP, first, eight)} a decay of the same FLOPs."
    )
    low, narrow, decay = "fixed 0.2 FLOPs", "narrower, 0.2", "decay 0.2"
    assert verb(WIDE, low) == verb(WIDE, low, narrow) == verb(WIDE, low, decay)
    yield (
        f"On that of width 1024 fixed low rank at {share(WIDE, low)} has {result(WIDE, low)} % and "
        f"{verb(WIDE, low)} full rank, {result(WIDE, FULL)}, a narrower network and a decay of its "
        f"FLOPs, for {share(WIDE, low, 'cpu_seconds')} of full rank's CPU seconds and "
        f"{share(WIDE, low, 'memory_peak')} of its memory;"
    )
    small = "fixed 1/16"
    yield (
        f"at 1/16 of the rank it has {result(WIDE, small)} for {share(WIDE, small, 'cpu_seconds')} "
        f"and {share(WIDE, small, 'memory_peak')}. A decay {verb(WIDE, decay)} full rank and "
        f"{verb(WIDE, decay, narrow)} the narrower network."
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
    for name in (RESNET, DEEPER, LARGER):
        assert found(name).best(found(name).arms) == FULL
        others = (verb(name, arm, NARROW) for arm in (FIXED, found(name).decay("0.65"), LOW))
        assert "is better than" not in others
    assert [place(name) for name in (RESNET, DEEPER, LARGER)] == [5, 5, 2]
    yield f"second on the ResNet-20 by its mean, for {share(LARGER, LOW, ALL_FLOPS)} of the FLOPs"


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
    yield f"a decay at {share(VIT, decay)} {verb(VIT, decay)} full rank and both of them."


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
    further = {f"{found(name).calibration(decay):.1f}" for name in (ENCODER, *PAIRS)}
    assert further == {"0.3"}
    yield f"costs a further {found(ENCODER).calibration(decay):.2f} of a tuning this short"


def costs() -> Iterator[str]:
    """Yield what memory and seconds say."""
    yield (
        f"On the GPT the narrower network takes {share(GPT, NARROW, 'memory_peak')} of "
        f"full rank's memory and {share(GPT, NARROW, 'cpu_seconds')} of its CPU seconds, "
        f"the decay of {share(GPT, DECAY)} takes "
        f"{share(GPT, DECAY, 'memory_peak')} and "
        f"{share(GPT, DECAY, 'cpu_seconds')}"
    )
    for name in (GPT, BYTE, MEDIUM, MLP, RESNET, DEEPER, LARGER, VIT, SMALL_BERT):
        assert found(name).share(NARROW, "cpu_seconds") < 0.95
    for arm in ("narrower, 0.3", "fixed 0.3 FLOPs", "decay 0.3"):
        assert found(WIDE).share(arm, "cpu_seconds") < 0.7
    for name in (RESNET, DEEPER, LARGER, VIT):
        for arm in (FIXED, found(name).decay("0.65"), LOW):
            assert found(name).share(arm, "cpu_seconds") > 0.9


def calibrations() -> Iterator[str]:
    """Yield what calibration costs on more and on fewer batches."""
    many, few = (
        [f"{found(name).calibration(arm):.2f}" for name in (GPT, MLP, RESNET)]
        for arm in ("decay 0.65", DECAY)
    )
    yield (
        f"cost a further {many[0]} of full rank's training on the GPT, {many[1]} on the MLP and "
        f"{many[2]} on the ResNet-8"
    )
    assert {verb(name, DECAY, "decay 0.65") for name in (GPT, MLP, RESNET)} == {
        "is not distinguishable from"
    }
    yield f"with 8, which is the default, {few[0]}, {few[1]} and {few[2]}, and the results"


def met() -> Iterator[str]:
    """Yield who is on the front, who meets full rank, and what inflation was worth."""
    for name in (GPT, BYTE, MEDIUM, MLP, RESNET, DEEPER, LARGER, VIT):
        assert any(arm.startswith("narrower") for arm in found(name).front())
    assert {arm.partition(" ")[0] for arm in found(WIDE).front()} == {"fixed"}
    assert not any(found(name).meets_full(arm) for name in (GPT, MEDIUM) for arm in cheap(name))
    assert found(MEDIUM).meets_full(DECAY)
    half = "decay 0.5"
    assert found(BYTE).meets_full(half) and found(BYTE).cheap(half)
    yield f"by a decay at {share(BYTE, half, ALL_FLOPS)} on the byte GPT, which ends at"
    yield f"ends at {share(BYTE, half, 'end_flops')} of full rank's FLOPs a step;"
    difference = behind(GPT, DECAY).replace(" (", " behind, ").removesuffix(")")
    yield (
        f"({difference}, at {share(GPT, DECAY, ALL_FLOPS)}), and meets full rank on the "
        f"largest for {share(MEDIUM, DECAY, ALL_FLOPS)} in all"
    )
    images = (MLP, RESNET, DEEPER, LARGER, VIT)
    assert [n for n in images if any(schedule(n, arm) for arm in cheap(n))] == [VIT]
    two = [arm for arm in cheap(WIDE) if schedule(WIDE, arm) and arm.startswith("decay")]
    assert two == ["decay 0.2", "decay 0.3"]
    for name in (DEEPER, LARGER):
        assert verb(name, found(name).decay("0.65")) == "is worse than"
    assert verb(GPT, LOW, LIKE_LOW) == verb(GPT, DECAY, LOW) == "is better than"
    assert verb(MLP, LOW, LIKE_LOW) == "is worse than"
    yield f"On the byte GPT it {verb(BYTE, LOW, FIXED)} fixed low rank of {share(BYTE, FIXED)} of"
    others = (verb(name, LOW, LIKE_LOW) for name in (RESNET, VIT, SMALL_BERT))
    assert set(others) == {"is not distinguishable from"}
    for name in (GPT, BYTE, MEDIUM, MLP, WIDE, TABLE, RESNET, DEEPER, LARGER, VIT, SMALL_BERT):
        inflated, before, _ = around(found(name).arms[LOW])
        assert inflated < before and found(name).share(LOW, ALL_FLOPS) > CHEAP
    assert all(verdict(found(name)).startswith("No arm") for name in (RESNET, TABLE, LARGER))


def cheap(name: str) -> list[str]:
    """Return the arms that cost few FLOPs and end at few."""
    return [arm for arm in found(name).arms if found(name).cheap(arm)]


def schedule(name: str, arm: str) -> bool | None:
    """Return whether an arm changes layers in training and meets full rank."""
    return found(name).changes(arm) and found(name).meets_full(arm)


def helps_nobody() -> Iterator[str]:
    """Yield where no schedule helps."""
    for name in (GPT, BYTE, MLP, VIT, RESNET, SMALL_BERT):
        ahead = found(name).difference(found(name).decay("0.65"), "shorter, 0.65")
        assert ahead is not None and (ahead.mean > 0) == (name != SMALL_BERT)
    for arm in ("ReLoRA", "LoRA from scratch"):
        yield f"{arm} costs {share(MLP, arm)} of full rank on the MLP"
    soft = f"{LOW}, soft"
    yield f"with an orthogonality penalty it has {result(MLP, soft)} on the MLP and"
    yield f"{verb(MLP, soft)} full rank there"
    yield f"on the ResNet-8 {result(RESNET, soft)}, and it {verb(RESNET, soft)} full rank"


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
