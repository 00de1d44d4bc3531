"""Choose a schedule: what it says in words, from the records of the evidence."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.training.harness.summary import ALL_FLOPS, FULL

from . import evidence
from .evidence import (
    BYTE,
    DEEPER,
    FIXED,
    GPT,
    LARGER,
    LIKE_LOW,
    LOW,
    MEDIUM,
    MLP,
    NARROW,
    RESNET,
    VIT,
    WIDE,
    WRN,
    compared,
    found,
    verb,
)

PAGE = "docs/how-to/choose-a-schedule.md"
SETTINGS: tuple[str, ...] = ()
BETTER, WORSE, ALIKE = "is better than", "is worse than", "is not distinguishable from"


def claims() -> Iterator[str]:
    """Check the words; yield those that follow."""
    evidence.corrections()
    yield from _transformers()
    yield from _perceptrons()
    yield from _images()
    yield from _paper()
    yield from _encoder()


def _transformers() -> Iterator[str]:
    for budget in ("0.5", "0.65"):
        decay = found(GPT).decay(budget)
        others = (f"fixed {budget} FLOPs", f"shorter, {budget}", f"narrower, {budget}")
        assert {verb(GPT, decay, other) for other in others} == {BETTER}
    assert verb(GPT, found(GPT).decay("0.5"), "full first 0.5") == BETTER
    for name in (BYTE, MEDIUM):
        decay = found(name).decay("0.65")
        assert {verb(name, decay, other) for other in (FIXED, NARROW)} == {BETTER}
    assert found(BYTE).meets_full("decay 0.5")
    halves = (evidence.HALF_FIXED, evidence.HALF_NARROW, "shorter, 0.5")
    assert {verb(BYTE, "decay 0.5", other) for other in halves} == {BETTER}
    yield "On the smaller of these half of the FLOPs were enough for the loss of full rank, and"


def _perceptrons() -> Iterator[str]:
    small, low = "fixed 1/16", "fixed 0.2 FLOPs"
    yield f"at a sixteenth of the rank {_past(verb(WIDE, small))} full rank, for"
    assert round(1 / found(WIDE).share(small, ALL_FLOPS)) == 7
    assert round(1 / found(WIDE).share(small, "cpu_seconds")) == 4
    assert 0.28 < found(WIDE).share(low, ALL_FLOPS) < 0.38
    assert found(WIDE).arms[low].runs[0]["setting"]["decay"] == "product"
    others = {
        FULL: "full rank",
        "narrower, 0.3": "a narrower network",
        "decay 0.2": "a decay of its training FLOPs",
        "decay 0.3": "a decay of half as many again",
    }
    yield f"it {_past(compared(WIDE, low, others))}."
    for budget in ("0.5", "0.65"):
        decay = found(MLP).decay(budget)
        assert verb(MLP, decay, f"fixed {budget} FLOPs") == BETTER
        assert verb(MLP, decay, f"narrower, {budget}") == ALIKE
    first, eight = "full first 0.3", found(MLP).decay("0.3")
    assert verb(MLP, first, eight) == verb(MLP, first, "fixed 0.3 FLOPs") == BETTER
    assert found(MLP).share(first, "cpu_seconds") < found(MLP).share(eight, "cpu_seconds")
    yield "beat both eight cuts and fixed low rank, and was faster."


def _images() -> Iterator[str]:
    assert verb(VIT, NARROW) == verb(VIT, "fixed 0.5 FLOPs") == ALIKE
    assert verb(VIT, "decay 0.65", FIXED) == verb(VIT, "decay 0.65", NARROW) == WORSE
    assert verb(VIT, "decay 0.5", "fixed 0.5 FLOPs") == WORSE
    assert verb(VIT, "decay 0.5", "narrower, 0.5") == ALIKE
    yield "was behind both, one of half behind fixed low rank only,"
    assert evidence.led() > 0
    halves = (evidence.HALF_NARROW, evidence.HALF_FIXED)
    (how,) = {verb(evidence.SST, arm) for arm in halves}
    yield f"fixed low rank of half of the FLOPs {_past(how).replace('was', 'were')} full rank; so"
    for name in (RESNET, DEEPER, LARGER, WRN):
        decay = found(name).decay("0.65")
        assert found(name).best(found(name).arms) == FULL
        assert BETTER not in (verb(name, decay, FIXED), verb(name, decay, NARROW))
        for arm in set(found(name).arms) - {FULL, NARROW}:
            beaten = name == LARGER and arm == LIKE_LOW
            assert (verb(name, arm, NARROW) == BETTER) == beaten
        if name != RESNET:  # it is not timed
            seconds = (found(name).share(arm, "cpu_seconds") for arm in (FIXED, decay, LOW))
            assert found(name).share(NARROW, "cpu_seconds") < min(seconds)
    costs = (evidence.share(LARGER, arm) for arm in (LIKE_LOW, NARROW))
    yield f"fixed low rank of more FLOPs, {' to '.join(costs)}, was better than it on the"
    low = (FIXED, "decay 0.65", LOW, LIKE_LOW)
    assert {verb(WRN, NARROW, arm) for arm in low} == {BETTER}
    for name in (GPT, BYTE, MEDIUM, MLP, VIT, RESNET, DEEPER, LARGER, WRN):
        for cost in ("memory_peak", "cpu_seconds")[: 1 if name == RESNET else 2]:
            narrow = found(name).share(NARROW, cost)
            assert narrow < found(name).share(found(name).decay("0.65"), cost)


def _paper() -> Iterator[str]:
    assert verb(GPT, LOW, LIKE_LOW) == BETTER
    assert verb(GPT, LIKE_LOW, FIXED) == WORSE and verb(GPT, LOW, FIXED) == ALIKE
    assert verb(RESNET, LOW, LIKE_LOW) == ALIKE
    assert {verb(name, LOW, LIKE_LOW) for name in (BYTE, MLP, DEEPER)} == {WORSE}
    soft = f"{LOW}, soft"
    assert min(found(MLP).share(soft, cost) for cost in (ALL_FLOPS, "cpu_seconds")) > 1
    yield f"it {_past(verb(MLP, soft))} full rank on the narrow MLP, for more than its"


def _past(words: str) -> str:
    return words.replace("is ", "was ")


def _encoder() -> Iterator[str]:
    lora = "LoRA, rank 8", "LoRA by PEFT, rank 8"
    cuts, shorter = ("cut to 0.7", "decay 0.7"), "shorter, 0.7"
    mrpc, rte = evidence.PAIRS
    ours, peft = (_past(verb(evidence.ENCODER, arm)) for arm in lora)
    yield f"on STS-B LoRA here {ours} full fine-tuning, and PEFT's {peft} it, for"
    assert {verb(evidence.ENCODER, arm) for arm in (*cuts, shorter)} == {WORSE}
    assert all(0.6 < found(evidence.ENCODER).share(arm, ALL_FLOPS) < 0.72 for arm in lora)
    assert {verb(mrpc, arm) for arm in lora} == {WORSE}
    assert {verb(rte, arm) for arm in (*cuts, lora[0])} == {WORSE}
    assert {verb(rte, arm) for arm in (lora[1], shorter)} == {verb(mrpc, shorter)} == {ALIKE}
