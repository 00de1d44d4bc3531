"""Regularizers: kinds of decay compared, and what is not offered."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature

from benchmarks.training.studies.factors import polar

from .methods_shared import number, spread
from .records import mean, read_lines, select, values

PAGE = "docs/methods/regularizers.md"
SETTINGS = ("Cut from full rank to 0.117 of its FLOPs", "λ = 0.5 ramped up", "to 1e-12 in fp64")


def claims() -> Iterator[str]:
    """Yield the figures as the page has them."""
    runs = select(read_lines("training/results/2026-11-28-factors/runs.jsonl"), problem="fash")

    def accuracy(arm: str) -> str:
        return f"{spread(values(runs, 'accuracy', arm=arm), 2)}%"

    three = (values(runs, "accuracy", arm=arm) for arm in ("product decay", "no decay", "low rank"))
    yield f"({number(*three)}). On a small"
    yield f"({number(values(runs, 'accuracy', arm='cut, conditioned'))} seeds, "
    yield f"decay of the product {accuracy('product decay')}"
    yield f"no decay {accuracy('no decay')}"
    yield f"by the optimizer {accuracy('low rank')}"
    yield f"the same perceptron reaches {accuracy('cut')}"
    products = 3 * signature(polar).parameters["steps"].default
    yield (
        f"gave {accuracy('cut, conditioned')}, too small a difference for two seeds, at {products} "
        "more products of matrices a step and weight."
    )
    cost, usual = (mean(values(runs, "flops", arm=arm)) for arm in ("cut, distilled", "cut"))
    distilled = f"{accuracy('cut, distilled')} at {cost:.2f} of the FLOPs"
    yield f"before the cut gave {distilled} in place of {usual:.2f}"
    yield _residual()


def _residual() -> str:
    """Compare on the same seeds."""
    runs = read_lines("training/results/2026-11-28-convolutions/runs.jsonl")
    arms = ("fixed, product decay 0.5", "fixed 0.5")
    decayed, fixed = ({r["seed"]: r["accuracy"] for r in select(runs, arm=arm)} for arm in arms)
    ahead = spread([decayed[seed] - fixed[seed] for seed in fixed], 2)
    return f"ahead by {ahead} points (n = {len(fixed)})"
