"""The verdict: shares, errors and the order of what counts, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dynarank.planning.headroom_result import Arm, Headroom, RankHeadroom, Verdict


def at(
    full: float, low: float, cut: float, *, noise: float = 0.0, rank: int = 4, cost: float = 0.5
) -> RankHeadroom:
    """Two seeds of four batches: a mean, and paired noise between low rank and the others."""
    spread = noise * torch.tensor([1.0, -1.0])[:, None].expand(2, 4)
    whole = torch.arange(4.0)  # batches differ, which no paired difference shows
    arms = [Arm(value + whole - whole.mean() + add, 1.0)
            for value, add in ((full, 0 * spread), (low, spread), (cut, 0 * spread))]  # fmt: skip
    return RankHeadroom(rank, cost, *arms)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (at(1.0, 2.0, 1.2), "headroom"),
        (at(1.0, 2.0, 1.9), "none"),
        (at(1.0, 2.0, 2.3), "none"),
        (at(1.0, 1.005, 1.0), "no gap"),
        (at(1.0, 0.8, 1.0), "no gap"),
        (at(1.0, 1.1, 1.0, noise=0.1), "cannot tell"),
        (at(1.0, 2.0, 1.45, noise=0.2), "cannot tell"),
        (at(1.0, math.inf, 1.0), "cannot tell"),
        (at(1.0, 2.0, math.inf), "cannot tell"),
        (at(0.0, 0.0, 0.0), "no gap"),
    ],
)
def test_verdict(found: RankHeadroom, verdict: Verdict) -> None:
    assert found.verdict == verdict
    assert verdict in str(Headroom((found,), 10)).replace("Cannot", "cannot")


def test_share_and_errors() -> None:
    found = at(1.0, 2.0, 1.25, noise=0.1)
    assert found.gap == pytest.approx(1.0) and found.share == pytest.approx(0.75)
    # Seeds differ by 0.2: a standard deviation of 0.1 sqrt(2), over sqrt(2).
    assert found.gap_error == pytest.approx(0.1)
    assert found.share_error == pytest.approx(0.1 * (1 - 0.75))
    assert found.lost == pytest.approx(0.25)


def test_the_cheapest_rank_with_headroom_decides() -> None:
    none, much, more, gapless = (
        at(1.0, 3.0, 2.9, rank=1, cost=0.1),
        at(1.0, 2.0, 1.1, rank=2, cost=0.2),
        at(1.0, 1.5, 1.005, rank=4, cost=0.4),
        at(1.0, 1.0, 1.0, rank=8, cost=0.8),
    )
    assert Headroom((none, much, more, gapless), 10).deciding is much
    assert Headroom((none, much, more, gapless), 10).needed_rank == 4
    assert Headroom((none, gapless), 10).verdict == "none"
    assert Headroom((gapless,), 10).verdict == "no gap"
