"""The experiments that pages speak of: their runs, and how arms compare, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import fmean

from benchmarks.training.harness import statistics, tuning
from benchmarks.training.harness.arm import Setting
from benchmarks.training.harness.jobs import as_run
from benchmarks.training.harness.record import Run
from benchmarks.training.harness.store import Store
from benchmarks.training.harness.summary import FULL, Summaries
from benchmarks.training.harness.tables import digits

from .records import read_lines, select
from .words import NUMBERS

GPT, MLP, TABLE, RESNET = "gpt_characters", "mlp_256", "mlp_table", "resnet_fashion"
WIDE = "mlp_1024"
LONG, LONG_DECAY = "gpt_characters_long", "decay 0.65"
LONG_MLP = "mlp_256_long"
BYTE, MEDIUM, ENCODER, VIT = "gpt_bytes", "gpt_10m", "encoder_stsb", "vit_cifar"
PAIRS = "encoder_mrpc", "encoder_rte"
DEEPER, LARGER, SMALL_BERT, SST = "resnet_cifar", "resnet20_cifar", "bert_mrpc", "bert_sst2"
WRN = "wrn_cifar100"
DECAY, FIXED, NARROW = "decay 0.65, 8 batches", "fixed 0.65 FLOPs", "narrower, 0.65"
HALF_NARROW, HALF_FIXED = "narrower, 0.5", "fixed 0.5 FLOPs"
LOW, LIKE_LOW = "paper, low-rank ending", "fixed as paper, low-rank ending"
BETTER, WORSE, ALIKE = "is better than", "is worse than", "is not distinguishable from"
GPTS, RESNETS = (GPT, BYTE, MEDIUM), (RESNET, DEEPER, LARGER)
ENCODERS = (ENCODER, *PAIRS)
NARROWED = (*GPTS, LONG, MLP, LONG_MLP, WIDE, TABLE, *RESNETS, WRN, VIT, SMALL_BERT, SST)
"""The problems of which narrower networks have run: all but the encoders."""
LARGEST = dict.fromkeys(NARROWED, "0.65") | {WIDE: "0.3", LONG_MLP: "0.5"}
"""The largest budget of each problem's decays."""


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


@cache
def of_experiment(name: str) -> list[Run]:
    """Return all runs on record of an experiment."""
    return Store(name).runs()


@cache
def tuned(name: str, arm: str) -> dict[Setting, float]:
    """Return what an arm's settings gave in the runs that chose one, by means; larger is better."""
    experiment = found(name).experiment
    runs = of_experiment(name)
    lead = as_run(experiment.by_name[arm], experiment, runs, "valid")
    assert lead is not None
    every = tuning.found(lead, runs, experiment.metric, experiment.higher, experiment.tuning)
    return {setting: fmean(results.values()) for setting, results in every.items()}


def parameters(name: str) -> str:
    """Return how many parameters a network has, in millions.

    Example:
        >>> parameters("gpt_10m")
        '10 million'
    """
    return f"{found(name).arms[FULL].runs[0]['parameters_peak'] // 10**6} million"


def rates_tried(name: str) -> int:
    """Return the fewest rates that were tried for an arm of an experiment."""
    experiment = found(name).experiment
    leads = {experiment.tuned(experiment.by_name[arm]).name for arm in found(name).arms}
    return min(len({one.rate for one in tuned(name, lead)}) for lead in leads)


def corrected_to_fixed(name: str) -> list[str]:
    """Return the arms that differ from fixed low rank of their FLOPs, with Holm's correction."""
    others = {arm: found(name).counterpart(arm) for arm in found(name).arms}
    pairs = {arm: found(name).difference(arm, one) for arm, one in others.items() if one}
    return statistics.corrected({arm: one for arm, one in pairs.items() if one is not None})


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
    return WORSE if difference.high < 0 else ALIKE


def verbs(name: str, arms: Iterable[str], *others: str) -> set[str]:
    """Return how arms compare with others, or with full rank."""
    return {verb(name, arm, other) for arm in arms for other in others or (FULL,)}


def cuts(name: str, arm: str) -> str:
    """Return at how many times of a run layers change in an arm, in words."""
    return NUMBERS[len({change["step"] for change in found(name).arms[arm].runs[0]["changes"]})]


def unclipped(arm: str) -> list[float]:
    """Return the test losses of the byte GPT without clipping, at the one rate that both have."""
    runs = read_lines("training/results/2026-11-30-byte-gpt-rates/runs.jsonl")
    of_arm = select(runs, arm=arm, part="test")
    return [run["result"]["loss"] for run in of_arm if run["setting"]["rate"] == 0.25]


def steps_of_tuning() -> int:
    """Return for how many steps the one run trains that tries a rate of the largest GPT."""
    assert len(found(MEDIUM).experiment.tuning) == 1
    steps = found(MEDIUM).arms[FULL].runs[0]["steps"]
    return round(found(MEDIUM).experiment.tuning_length * steps)


def led() -> float:
    """Return by how much the ViT's larger decay led full rank in the runs that chose the rates."""
    decay, full = (max(tuned(VIT, arm).values()) for arm in ("decay 0.65", FULL))
    assert all(decay > max(tuned(VIT, arm).values()) for arm in (NARROW, FIXED, HALF_FIXED))
    return decay - full


def corrected(name: str, other: str) -> list[str]:
    """Return the arms that differ from another, with Holm's correction for all arms."""
    pairs = {arm: found(name).difference(arm, other) for arm in found(name).arms if arm != other}
    return statistics.corrected({arm: one for arm, one in pairs.items() if one is not None})


def first_cut(name: str, arm: str) -> float:
    """Return after which share of a run layers change first."""
    (time,) = {run["changes"][0]["step"] / run["steps"] for run in found(name).arms[arm].runs}
    return time


def longer(name: str, short: str) -> str:
    """Return how many times as long as another experiment's the runs of one are, in words."""
    long, other = (found(one).arms[FULL].runs[0]["steps"] for one in (name, short))
    assert long % other == 0
    return NUMBERS[long // other]


def width(name: str) -> str:
    """Return the width of an MLP.

    Example:
        >>> width("mlp_256")
        '256'
    """
    return found(name).experiment.title.split("-")[1]
