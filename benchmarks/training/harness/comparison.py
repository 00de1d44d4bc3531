"""Problems side by side: the main arms against each other, in which order, at which costs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.training.harness.summary import ALL_FLOPS, FEW, FULL, SECONDS, Summaries
from benchmarks.training.harness.tables import beside, markdown

PAPER = "paper, low-rank ending"
LIKE = (
    ("gpt_characters", "gpt_bytes"),
    ("gpt_characters", "gpt_10m"),
    ("gpt_bytes", "gpt_10m"),
    ("mlp_256", "mlp_1024"),
    ("resnet_fashion", "resnet_cifar"),
    ("resnet_fashion", "resnet20_cifar"),
    ("resnet_cifar", "resnet20_cifar"),
    ("resnet20_cifar", "wrn_cifar100"),
    ("bert_mrpc", "bert_sst2"),
)
"""A smaller problem and a larger one of its kind."""
NAMED = 4  # of the arms in their order


def differences(problems: Sequence[Summaries]) -> str:
    """What the largest decay and the paper's order win or lose against the others."""
    head = (
        "problem", "n", "decay", "minus full rank", "minus fixed low rank",
        "minus narrower", "minus shorter", "paper minus full rank", "paper minus fixed low rank",
    )  # fmt: skip
    rows = [_differences(found) for found in problems if _budget(found) is not None]
    return markdown(head, rows)


def _differences(found: Summaries) -> tuple[str, ...]:
    budget = _budget(found)
    decay = found.decay(budget)
    others = (FULL, f"fixed {budget} FLOPs", f"narrower, {budget}", f"shorter, {budget}")
    paper = () if PAPER not in found.arms else (FULL, found.counterpart(PAPER))
    return (
        found.experiment.short, str(found.arms[decay].n), str(budget),
        *(beside(found, decay, other) for other in others),
        *(beside(found, PAPER, other) for other in paper or (None, None)),
    )  # fmt: skip


def _budget(found: Summaries) -> str | None:
    """The largest budget of a decay that has run."""
    return _largest(found, "decay ")


def _largest(found: Summaries, kind: str) -> str | None:
    """The largest budget of the arms that are named so."""
    budgets = [re.fullmatch(rf"{kind}([\d.]+)(?:{FEW})?", name) for name in found.arms]
    return max((one[1] for one in budgets if one), key=float, default=None)


def costs(problems: Sequence[Summaries]) -> str:
    """All FLOPs, CPU seconds and memory of the arms of one budget, relative to full rank."""
    head = (
        "problem", "budget", "fixed low rank", "narrower", "decay", "full first",
        "the paper's order",
    )  # fmt: skip
    rows = [
        (found.experiment.short, budget, *(_costs(found, name) for name in _at(found, budget)))
        for found in problems
        if (budget := _smallest(found)) is not None
    ]
    return markdown(head, rows)


def _at(found: Summaries, budget: str) -> tuple[str, ...]:
    fixed, narrow, first = f"fixed {budget} FLOPs", f"narrower, {budget}", f"full first {budget}"
    return fixed, narrow, found.decay(budget), first, PAPER


def _smallest(found: Summaries) -> str | None:
    """The largest budget at which one early cut has run, else that of a decay."""
    return _largest(found, "full first ") or _budget(found)


def _costs(found: Summaries, arm: str) -> str:
    if arm not in found.arms:
        return ""
    keys = (ALL_FLOPS, SECONDS, "memory_peak")
    known = (f"{found.share(arm, key):.2f}" if found.knows(arm, key) else "–" for key in keys)
    return " / ".join(known)


def orders(problems: Mapping[str, Summaries]) -> str:
    """Whether the order of the arms on a smaller problem is that on a larger one."""
    head = ("smaller problem", "larger", "arms", "Kendall's tau", "best on the larger, in order")
    return markdown(head, list(_orders(problems)))


def _orders(problems: Mapping[str, Summaries]) -> Iterator[tuple[str, ...]]:
    for pair in LIKE:
        if not set(pair) <= problems.keys():
            continue
        small, large = (problems[name] for name in pair)
        order, agreement = same_order(small, large)
        if len(order) < 3:
            continue
        yield (
            small.experiment.short, large.experiment.short, str(len(order)), f"{agreement:.2f}",
            ", ".join(f"“{name}”" for name in order[:NAMED]),
        )  # fmt: skip


def same_order(small: Summaries, large: Summaries) -> tuple[list[str], float]:
    """The whole arms of both problems, best on the larger first, and Kendall's tau."""
    one, other = _results(small), _results(large)
    arms = [name for name in one if name in other]
    order = sorted(arms, key=other.__getitem__, reverse=True)
    return order, tau([one[arm] for arm in arms], [other[arm] for arm in arms])


def _results(found: Summaries) -> dict[str, float]:
    """The means of whole arms, larger is better; of decays of one budget that on fewer batches."""
    # Those on few come after those on more.
    whole = [one for one in found.arms.values() if one.arm in found.whole]
    return {one.arm.removesuffix(FEW): found.sign * one.result for one in whole}


def tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau: 1 if both have the same order."""
    from scipy import stats

    return float(stats.kendalltau(one, other).statistic)
