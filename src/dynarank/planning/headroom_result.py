"""The result of the headroom probe: losses, errors, a verdict, one sentence and a small table."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from dynarank.forms import Rank, RankLike

__all__ = ["Arm", "Headroom", "RankHeadroom", "Verdict"]

Verdict: TypeAlias = Literal["headroom", "none", "no gap", "cannot tell"]

MATTERS = 0.01
"""The smallest difference that matters, as a share of the full-rank loss."""
ENOUGH = 0.5
"""The smallest share of the gap whose recovery is called headroom."""


@dataclass(frozen=True, eq=False)
class Arm:
    """The short runs of one kind, at its best learning rate.

    Args:
        losses: the held-out losses, (seeds, batches).
        rate: the best multiple of the optimizer's learning rate.
    """

    losses: Tensor
    rate: float

    @property
    def loss(self) -> float:
        """The mean held-out loss; infinite if a run diverged."""
        return self.losses.mean().item()


@dataclass(frozen=True, eq=False)
class RankHeadroom:
    """What was found at one rank.

    ``share = (L_low - L_cut) / (L_low - L_full)``, with the held-out losses L of the three arms.

    Args:
        rank: the rank, as it was asked for.
        cost: FLOPs of a training step at this rank, relative to full rank.
        full: full rank throughout.
        low: low rank from scratch.
        cut: full rank first, then cut to the same cost.
    """

    rank: RankLike
    cost: float
    full: Arm
    low: Arm
    cut: Arm

    @property
    def gap(self) -> float:
        """The loss of low rank from scratch above that of full rank."""
        return self.low.loss - self.full.loss

    @property
    def gap_error(self) -> float:
        """The standard error of the gap."""
        return _error(self.low.losses - self.full.losses)

    @property
    def share(self) -> float:
        """The headroom: the share of the gap that is recovered by starting at full rank."""
        return (self.low.loss - self.cut.loss) / self.gap if self.gap else math.nan

    @property
    def share_error(self) -> float:
        """The standard error of the share, of the paired differences."""
        gap = self.low.losses - self.full.losses
        return _error(self.low.losses - self.cut.losses - self.share * gap) / abs(self.gap or 1)

    @property
    def lost(self) -> float:
        """The loss of the cut network above that of full rank, as a share of the latter."""
        return (self.cut.loss - self.full.loss) / abs(self.full.loss or 1)

    @property
    def verdict(self) -> Verdict:
        """Whether a schedule has anything to gain at this rank."""
        if not math.isfinite(self.gap) or not math.isfinite(self.cut.loss):
            return "cannot tell"
        if self.gap <= MATTERS * abs(self.full.loss):
            return "no gap"
        if self.gap <= 2 * self.gap_error:
            return "cannot tell"
        if self.share - self.share_error >= ENOUGH:
            return "headroom"
        return "none" if self.share + self.share_error < ENOUGH else "cannot tell"


@dataclass(frozen=True, eq=False)
class Headroom:
    """What the probe found: ``print(found)`` shows one sentence and a table.

    Args:
        ranks: what was found at each rank, cheapest first.
        steps: the length of each run.
    """

    ranks: tuple[RankHeadroom, ...]
    steps: int

    @property
    def full(self) -> Arm:
        """The full-rank runs."""
        return self.ranks[0].full

    @property
    def verdict(self) -> Verdict:
        """The verdict of :attr:`deciding`."""
        return self.deciding.verdict

    @property
    def deciding(self) -> RankHeadroom:
        """The cheapest rank with headroom; without one the cheapest where low rank loses."""
        order: tuple[Verdict, ...] = ("headroom", "none", "cannot tell", "no gap")
        return min(self.ranks, key=lambda one: (order.index(one.verdict), one.cost))

    @property
    def needed_rank(self) -> RankLike | None:
        """The cheapest rank at which the cut network is as good as full rank, within 1%."""
        return next((one.rank for one in self.ranks if one.lost <= MATTERS), None)

    @property
    def sentence(self) -> str:
        """The answer."""
        one, runs = self.deciding, f"{self.full.losses.shape[0]} x {self.steps} steps"
        where = f"at rank {_rank(one.rank)} ({one.cost:.3f} of the FLOPs)"
        share = f"{100 * one.share:.0f} ± {100 * one.share_error:.0f} %"
        return {
            "headroom": f"Headroom: {where} starting at full rank and cutting recovers {share} of "
            "what low rank loses; use a schedule that comes down from full rank.",
            "none": f"No headroom: {where} starting at full rank and cutting recovers {share} of "
            "what low rank loses, so capacity binds; use fixed low rank, as high as you can pay.",
            "no gap": f"No gap: in {runs} low rank is as good as full rank; use fixed low rank. "
            "If the real run is much longer, probe with more steps.",
            "cannot tell": f"Cannot tell: {where} the differences are within their errors after "
            f"{runs}; probe with more steps or seeds.",
        }[one.verdict]

    def __str__(self) -> str:
        rows = [("rank", "FLOPs", "low rank", "full, cut", "recovered", "verdict")]
        rows += [("full", "1.000", "", _loss(self.full), "", "")]
        rows += [_row(one) for one in self.ranks]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [_line(row, widths) for row in rows]
        needed = self.needed_rank
        last = "none of these" if needed is None else f"rank {_rank(needed)}"
        return "\n".join(
            [*textwrap.wrap(self.sentence, 80), "", *table, "",
             f"Held-out losses (x: best multiple of the learning rate). Needed: {last}."]
        )  # fmt: skip

    def to_data(self) -> dict[str, Any]:
        """The result as plain data, for JSON."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "needed_rank": _rank_data(self.needed_rank),
            "steps": self.steps,
            "seeds": self.full.losses.shape[0],
            "full": _arm_data(self.full),
            "ranks": [_rank_headroom_data(one) for one in self.ranks],
        }


def _error(differences: Tensor) -> float:
    """The standard error of the mean of paired differences (seeds, batches)."""
    seeds, batches = differences.mean(1), differences.flatten()
    errors = [_std(one) / math.sqrt(len(one)) for one in (seeds, batches)]
    return max(errors)


def _std(values: Tensor) -> float:
    return values.std().item() if len(values) > 1 else 0.0


def _row(one: RankHeadroom) -> tuple[str, ...]:
    known = one.verdict in ("headroom", "none") or (one.verdict == "cannot tell" and one.gap > 0)
    share = f"{100 * one.share:.0f} ± {100 * one.share_error:.0f} %" if known else ""
    arms = _loss(one.low), _loss(one.cut)
    return _rank(one.rank), f"{one.cost:.3f}", *arms, share, one.verdict


def _loss(arm: Arm) -> str:
    return f"{arm.loss:.4f} (x{arm.rate:.2g})"


def _rank(rank: RankLike) -> str:
    return f"{rank.value:g}:{rank.of}" if isinstance(rank, Rank) else f"{rank:g}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [f"{cell:>{width}}" for cell, width in zip(row[:-1], widths, strict=False)]
    return "  ".join([*cells, row[-1]]).rstrip()


def _rank_data(rank: RankLike | None) -> Any:
    return dict(vars(rank)) if isinstance(rank, Rank) else rank


def _arm_data(arm: Arm) -> dict[str, Any]:
    losses = [[_finite(value) for value in seed] for seed in arm.losses.tolist()]
    return {"loss": _finite(arm.loss), "rate": arm.rate, "losses": losses}


def _rank_headroom_data(one: RankHeadroom) -> dict[str, Any]:
    numbers = ("cost", "gap", "gap_error", "share", "share_error")
    return {
        "rank": _rank_data(one.rank),
        "verdict": one.verdict,
        **{name: _finite(getattr(one, name)) for name in numbers},
        "low_rank": _arm_data(one.low),
        "cut": _arm_data(one.cut),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
