"""Evidence: the answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from benchmarks.training.harness.summary import ALL_FLOPS, FULL, Summaries
from benchmarks.training.harness.tables import around, digits

PAGE = "docs/evidence.md"
SETTINGS = (
    "95% intervals",
    "t-test at 5%",
    *("fixed 0.5 FLOPs", "narrower, 0.5", "shorter, 0.5", "decay 0.5", "full first 0.5"),
    "at no more than 0.65 of its FLOPs, with a last network of 0.6",
    "bold where the 95% interval of this one difference",
    "of no more than 0.65 of the FLOPs",
    "a GPT of 10 million parameters, for 400 steps",
    "On the GPT of 10 million parameters no, in a short run",
    "Kendall's tau of the means; 1 is",
    "from 1e-5 to 1e-2",
    "decay of 0.65 cost a further",
)
GPT, MLP, TABLE, RESNET = "gpt_characters", "mlp_256", "mlp_table", "resnet_fashion"
MEDIUM, ENCODER, VIT, DEEPER = "gpt_10m", "encoder_stsb", "vit_cifar", "resnet_cifar"
DECAY = "decay 0.65, 8 batches"
LOW, LIKE_LOW = "paper, low-rank ending", "fixed as paper, low-rank ending"


def claims() -> Iterator[str]:
    """Yield the sentences of the answers."""
    yield from transformers()
    yield from perceptrons()
    yield from convolutions()
    yield from vit()
    yield from order_of_the_paper()
    yield from medium()
    yield from pretrained()
    yield from costs()
    yield from calibrations()
    yield from helps_nobody()


def transformers() -> Iterator[str]:
    """Yield what the GPT says."""
    yield (
        f"On the character GPT a decay at {share(GPT, DECAY)} of the FLOPs ends at a loss "
        f"of {result(GPT, DECAY)}, fixed low rank of the same FLOPs at "
        f"{result(GPT, 'fixed 0.65 FLOPs')}, a narrower network at "
        f"{result(GPT, 'narrower, 0.65')}, full rank at {result(GPT, FULL)}."
    )
    yield f"It {verb(GPT, DECAY, 'narrower, 0.65')} the narrower network"
    yield f"and {verb(GPT, DECAY)} full rank."
    half = found(GPT).decay("0.5")
    yield (
        f"On the GPT no: the nearest is a decay that spends {share(GPT, half, ALL_FLOPS)}, worse "
        f"by {behind(GPT, half)}; one that spends {share(GPT, DECAY, ALL_FLOPS)} is worse by "
        f"{behind(GPT, DECAY)}."
    )


def perceptrons() -> Iterator[str]:
    """Yield what the MLP says."""
    yield (
        f"On the MLP of width 256 a narrower network of {share(MLP, 'narrower, 0.5')} of the FLOPs "
        f"has {result(MLP, 'narrower, 0.5')} %, a decay at {share(MLP, DECAY)} "
        f"{result(MLP, DECAY)}, fixed low rank at {share(MLP, 'fixed 0.65 FLOPs')} "
        f"{result(MLP, 'fixed 0.65 FLOPs')}, full rank {result(MLP, FULL)}."
    )
    yield f"A decay {verb(MLP, DECAY, 'fixed 0.65 FLOPs')} fixed low rank of its FLOPs"
    yield f"but {verb(MLP, DECAY, 'narrower, 0.65')} a narrower network of them."
    yield (
        f"One early cut at {share(MLP, 'full first 0.3')} has {result(MLP, 'full first 0.3')} and "
        f"{verb(MLP, 'full first 0.3', found(MLP).decay('0.3'))} a decay of the same FLOPs."
    )
    yield (
        f"of the FLOPs is a narrower network at "
        f"{share(MLP, 'narrower, 0.5')}, worse by {behind(MLP, 'narrower, 0.5')} points."
    )


def convolutions() -> Iterator[str]:
    """Yield what the ResNets say."""
    yield f"On the ResNet-8 a decay at {share(RESNET, DECAY)} {beside(RESNET, DECAY)}."
    yield (
        f"On the ResNet-8 no: the nearest is a narrower network at "
        f"{share(RESNET, 'narrower, 0.65')}, worse by {behind(RESNET, 'narrower, 0.65')} points."
    )
    decay = found(DEEPER).decay("0.65")
    yield (
        f"On the ResNet-14 the decay {beside(DEEPER, decay)}; the decay "
        f"{verb(DEEPER, decay, 'fixed 0.65 FLOPs')} fixed low rank and "
        f"{verb(DEEPER, decay, 'narrower, 0.65')} the narrower network."
    )
    narrow = "narrower, 0.65"
    yield (
        f"On the ResNet-14 no: the nearest is a narrower network at {share(DEEPER, narrow)}, worse "
        f"by {behind(DEEPER, narrow)} points."
    )


def beside(name: str, decay: str) -> str:
    """Return what a decay of 0.65 has, and what the networks next to it have."""
    narrow = "narrower, 0.65"
    return (
        f"has {result(name, decay)} %, fixed low rank {result(name, 'fixed 0.65 FLOPs')}, a "
        f"narrower network at {share(name, narrow)} {result(name, narrow)}, full rank "
        f"{result(name, FULL)}"
    )


def vit() -> Iterator[str]:
    """Yield what the ViT says."""
    fixed, narrow, decay = "fixed 0.5 FLOPs", "narrower, 0.5", "decay 0.5"
    yield (
        f"On the ViT fixed low rank at {share(VIT, fixed)} of the FLOPs has {result(VIT, fixed)} % "
        f"and {verb(VIT, fixed)} full rank, {result(VIT, FULL)}; a narrower network at "
        f"{share(VIT, narrow)} has {result(VIT, narrow)}, a decay at {share(VIT, decay)} "
        f"{result(VIT, decay)}, at {share(VIT, 'decay 0.65')} {result(VIT, 'decay 0.65')}, which "
        f"{verb(VIT, 'decay 0.65')} full rank."
    )
    assert all(found(VIT).meets_full(arm) for arm in (fixed, narrow, decay))
    yield (
        f"by a narrower network at {share(VIT, narrow, ALL_FLOPS)}, by fixed low rank at "
        f"{share(VIT, fixed, ALL_FLOPS)}, and within its noise by a decay at "
        f"{share(VIT, decay, ALL_FLOPS)} with a last network of {last(VIT, decay)}."
    )
    assert verb(VIT, LOW, LIKE_LOW) == "is not distinguishable from"
    yield f"the rank went from {ranks(VIT, 0)} to {ranks(VIT, 1)}."


def order_of_the_paper() -> Iterator[str]:
    """Yield what inflation restored and brought."""
    yield (
        f"worse than full rank by {behind(GPT, LOW)} on the GPT, at {share(GPT, LOW)} of the "
        f"FLOPs, by {behind(MLP, LOW)} points on the MLP, at {share(MLP, LOW)}, and by "
        f"{behind(RESNET, LOW)} points on the ResNet-8, at {share(RESNET, LOW)}."
    )
    yield f"from {ranks(MLP, 0)} to {ranks(MLP, 1)} of the largest possible"
    yield f"fixed low rank that spends the same FLOPs is better by {behind(MLP, LOW, LIKE_LOW)}"
    yield f"On the GPT it went from {ranks(GPT, 0)} to {ranks(GPT, 1)}"
    yield f"worse than the paper's order by {behind(GPT, LIKE_LOW, LOW)}"
    yield f"On the ResNet-8 it went from {ranks(RESNET, 0)} to {ranks(RESNET, 1)}"
    soft = f"{LOW}, soft"
    yield f"with an orthogonality penalty it has {result(MLP, soft)} on the MLP and"
    yield f"{verb(MLP, soft)} full rank there"
    yield f"on the ResNet-8 {result(RESNET, soft)}, and it {verb(RESNET, soft)} full rank"


def medium() -> Iterator[str]:
    """Yield what the GPT of 10 million parameters says."""
    decay, fixed = DECAY, "fixed 0.65 FLOPs"
    yield (
        f"a decay at {share(MEDIUM, decay)} of the FLOPs ends at {result(MEDIUM, decay)}, fixed "
        f"low rank of the same FLOPs at {result(MEDIUM, fixed)}, full rank at "
        f"{result(MEDIUM, FULL)} (n = {found(MEDIUM).arms[decay].n})"
    )
    assert found(MEDIUM).meets_full(decay)
    yield (
        f"a decay meets it, with a last network of {last(MEDIUM, decay)}, but with its "
        f"calibrations has spent {share(MEDIUM, decay, ALL_FLOPS)}."
    )
    few, many = (found(MEDIUM).calibration(arm) for arm in (DECAY, "decay 0.65"))
    yield (
        f"fixed low rank takes {share(MEDIUM, fixed, 'cpu_seconds')} of full rank's CPU seconds "
        f"there, a decay {share(MEDIUM, decay, 'cpu_seconds')} "
        f"({share(MEDIUM, 'decay 0.65', 'cpu_seconds')} if it calibrates on 32 batches instead of "
        f"8, which in 400 steps adds {many:.2f} instead of {few:.2f} of full rank's FLOPs)"
    )


def pretrained() -> Iterator[str]:
    """Yield what the encoder says."""
    ours, cut, decay, shorter = "LoRA, rank 8", "cut to 0.7", "decay 0.7", "shorter, 0.7"
    yield (
        f"reaches a correlation of {result(ENCODER, ours)} with LoRA of rank 8 here and "
        f"{result(ENCODER, 'LoRA by PEFT, rank 8')} with PEFT's, {result(ENCODER, FULL)} with full "
        f"fine-tuning, for {share(ENCODER, ours)} of its FLOPs and "
        f"{share(ENCODER, ours, 'memory_peak')} of its memory."
    )
    assert verb(ENCODER, cut) == verb(ENCODER, decay)
    yield (
        f"before the first step has {result(ENCODER, cut)}, a decay {result(ENCODER, decay)}: each "
        f"{verb(ENCODER, decay)} full fine-tuning, and the decay {verb(ENCODER, decay, shorter)} "
        f"full fine-tuning for fewer steps, {result(ENCODER, shorter)}."
    )


def costs() -> Iterator[str]:
    """Yield what memory and seconds say."""
    yield (
        f"On the GPT the narrower network takes {share(GPT, 'narrower, 0.65', 'memory_peak')} of "
        f"full rank's memory and {share(GPT, 'narrower, 0.65', 'cpu_seconds')} of its CPU seconds, "
        f"the decay of {share(GPT, DECAY)} takes "
        f"{share(GPT, DECAY, 'memory_peak')} and "
        f"{share(GPT, DECAY, 'cpu_seconds')}"
    )
    yield (
        f"on the MLP one early cut at half of the FLOPs takes "
        f"{share(MLP, 'full first 0.5', 'cpu_seconds')}, a narrower network "
        f"{share(MLP, 'narrower, 0.5', 'cpu_seconds')}"
    )


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


def helps_nobody() -> Iterator[str]:
    """Yield where no schedule helps."""
    for arm, words in (("ReLoRA", "ReLoRA"), ("LoRA from scratch", "LoRA from scratch")):
        yield f"{words} costs {share(MLP, arm)} of full rank on the MLP"


def ranks(name: str, place: int) -> str:
    """Return the mean effective rank at the start or the end of the paper's full-rank phase."""
    shares = around(found(name).arms[LOW])
    return f"{shares[place]:.2f}"


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


def last(name: str, arm: str) -> str:
    """Return the share of the FLOPs that the last step costs."""
    return f"{found(name).arms[arm].mean('end_flops'):.2f}"


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
