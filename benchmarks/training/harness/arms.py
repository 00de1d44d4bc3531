"""The arms that experiments are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.training.harness.arm import Arm
from dynarank.forms import Adapted, FullRank, LowRank, Rank, Within
from dynarank.schedules import (
    Phases,
    closed_loop,
    cuttlefish,
    decay,
    dynamic_rank,
    growing,
    lora,
    low_rank,
    published,
    pufferfish,
    relora,
    rotating,
)  # fmt: skip

LOW_RATES = (1.0, 2.0, 4.0)
"""Low rank usually wants a higher rate than full rank."""
INFLATE, DEFLATE = 55 / 150, 120 / 150
"""The published code's times on CIFAR-10."""
AS_PUBLISHED: dict[str, Any] = {"moments": "reset", "by_data": False}
"""New optimizers and plain truncations, as in the code of these methods."""


def full_rank() -> list[Arm]:
    """Full rank."""
    return [Arm("full rank", None)]


def narrow(*shares: float) -> list[Arm]:
    """Smaller full-rank networks of these FLOPs."""
    return [Arm(f"narrower, {share:g}", None, narrow=share) for share in shares]


def shorter(*shares: float) -> list[Arm]:
    """Full rank for these shares of the steps."""
    return [Arm(f"shorter, {share:g}", None, length=share) for share in shares]


def fixed(name: str, schedule: Any, **options: Any) -> Arm:
    """Fixed low rank with the best rate, start and decay."""
    starts, decays = ("truncated", "norm"), ("factors", "product")
    return Arm(f"fixed {name}", schedule, LOW_RATES, starts, decays, **options)


def fixed_ranks(of: Any = "min", *, shares: Sequence[float] = (1 / 4, 1 / 3, 1 / 2)) -> list[Arm]:
    """Fixed low rank at these shares of the largest rank, or of the outputs; tuned on the first."""
    return [
        fixed(f"1/{round(1 / share)}", low_rank(Rank(share, of=of)), family="fixed")
        for share in shares
    ]


def fixed_budgets(*budgets: float) -> list[Arm]:
    """Fixed low rank of these FLOPs."""
    return [fixed(f"{budget:g} FLOPs", low_rank(budget=budget)) for budget in budgets]


def matched(arms: Sequence[Arm]) -> list[Arm]:
    """Fixed low rank that spends what each of these arms spends; tuned as the fixed ranks."""
    return [fixed(f"as {arm.name}", None, family="fixed", spends=arm.name) for arm in arms]


def decays(*budgets: float) -> list[Arm]:
    """Decays from full rank that cost these FLOPs in total."""
    return [Arm(f"decay {b:g}", decay(total=b)) for b in budgets]


def on_few(arms: Sequence[Arm], batches: int = 8) -> list[Arm]:
    """These arms with calibrations on fewer batches; tuned as they are."""
    return [
        replace(arm, name=f"{arm.name}, {batches} batches", family=arm.kind, batches=batches)
        for arm in arms
    ]


def full_first(*budgets: float, at: float = 0.1) -> list[Arm]:
    """Full rank for a tenth of the run, then one cut, to these FLOPs in total."""
    return [Arm(f"full first {b:g}", decay(total=b, cuts=[at])) for b in budgets]


def cut(*budgets: float) -> list[Arm]:
    """Cut by data to these FLOPs before the first step: for networks that are trained already."""
    return [Arm(f"cut to {b:g}", Phases([0.0], [Within(flops=b)])) for b in budgets]


def adapters(*ranks: int, rates: Sequence[float]) -> list[Arm]:
    """LoRA by this library."""
    return [Arm(f"LoRA, rank {r}", lora(r, alpha=16.0), rates) for r in ranks]


def with_rates(arms: Sequence[Arm], rates: Sequence[float]) -> list[Arm]:
    """These arms, with other rates to try."""
    return [replace(arm, rates=rates) for arm in arms]


def paper(of: Any = "min", decompositions: Sequence[str] = ("svd",)) -> list[Arm]:
    """Low, full, adapted at half of the rank: as published, and with a low-rank ending.

    The decompositions share what is tuned, on the first of them.
    """
    half = Rank(0.5, of=of)
    published_ = [
        Arm(f"paper, {name}", published(half, decomposition=name), family="paper", **AS_PUBLISHED)
        for name in decompositions
    ]
    low = dynamic_rank(half, inflate=INFLATE, deflate=DEFLATE, to="low-rank")
    return [*published_, Arm("paper, low-rank ending", low)]


def orthogonal(arms: Sequence[Arm], penalty: str = "soft") -> list[Arm]:
    """These arms with an orthogonality penalty; tuned on the first."""
    own: dict[str, Any] = {"penalty": penalty, "coefficients": (1e-4, 1e-5, 1e-3, 1e-2)}
    return [replace(arm, name=f"{arm.name}, {penalty}", family=penalty, **own) for arm in arms]


def related(rank: Rank, every: int) -> list[Arm]:
    """Related methods; ``every`` is the number of steps of a restart's LR re-warm-up."""
    return [
        Arm("rotating", rotating(rank)),
        Arm("closed loop", closed_loop(rank)),
        Arm("Cuttlefish", cuttlefish(), **AS_PUBLISHED, rewarmup=every),
        Arm("Pufferfish", pufferfish(), **AS_PUBLISHED, rewarmup=every),
        Arm("growing", growing()),
        Arm("ReLoRA", relora(rank, rewarmup=every), moments="prune", rewarmup=every),
        Arm("LoRA from scratch", lora(rank), LOW_RATES),
    ]


def convolutional(every: int) -> list[Arm]:
    """Related methods that were published for convolutions."""
    names = ("Cuttlefish", "Pufferfish")
    return [arm for arm in related(Rank(1 / 4, of="out"), every) if arm.name in names]


def grid(
    of: Any = "min",
    inflate: Sequence[float] = (0.0, 0.2, 0.37, 0.55),
    deflate: Sequence[float] = (0.4, 0.6, 0.8, 1.0),
) -> list[Arm]:
    """The paper's order for each pair of times: adapted after deflation, at half of the rank."""
    return [
        Arm(f"{begin:g} to {end:g}", _order(Rank(0.5, of=of), begin, end), family="paper")
        for begin in inflate
        for end in deflate
        if begin < end
    ]


def _order(rank: Rank, inflate: float, deflate: float) -> Phases:
    """Low, full, adapted, without the phases that have no length."""
    phases = [(0.0, LowRank(rank)), (inflate, FullRank()), (deflate, Adapted(rank))]
    ends = [*(start for start, _ in phases[1:]), 1.0]
    kept = [phase for phase, end in zip(phases, ends, strict=True) if phase[0] < end]
    return Phases([start for start, _ in kept], [form for _, form in kept])
