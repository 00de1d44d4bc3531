"""Factors: initialization and learning rates compared."""

from __future__ import annotations

from collections.abc import Iterator

from .methods_shared import number, row, spread
from .records import Row, mean, read_json, read_lines, select, values

PAGE = "docs/methods/factors.md"
SETTINGS = ("tested to 1e-12 over six steps",)
PERCEPTRON = "perceptron 784-256-256-256-10, Fashion-MNIST, rank 16, AdamW; test accuracy, %"
GPT = "character GPT, width 64, rank 16, AdamW, 200 steps; validation loss"
STARTS = ("truncated", "norm")
RATES = {"fash": 0.002, "lm2": 0.012}  # records have factors of these


def claims() -> Iterator[str]:
    """Yield the figures as the page has them."""
    runs = read_lines("training/results/2026-11-28-factors/runs.jsonl")
    starts = [select(runs, problem="fash", decay="factors", start=s, rate=1) for s in STARTS]
    starts += [select(runs, problem="lm2", start=s, rate=1) for s in STARTS]
    yield f"over {number(*starts)} seeds, the same ones"
    perceptron = select(runs, problem="fash", decay="factors")
    full = spread(values(perceptron, "accuracy", start="never"), 2)
    for factor in (1, 2, 4):
        first = factor == 1
        cells = _cells(perceptron, "accuracy", factor, 2)
        yield row(PERCEPTRON if first else "", *cells, full if first else "")
    yield row(GPT, *_cells(select(runs, problem="lm2"), "loss", 1, 3), "")
    usual, twice = (
        mean(values(perceptron, "accuracy", start="truncated", rate=rate)) for rate in (1, 2)
    )
    yield f"better at twice its rate ({twice:.2f} against {usual:.2f})"
    yield from _rules()


def _cells(runs: list[Row], result: str, factor: float, digits: int) -> Iterator[str]:
    """Yield the learning rate and the results of both initializations."""
    yield f"{factor * RATES[runs[0]['problem']]:.3f}"
    for start in STARTS:
        yield spread(values(runs, result, start=start, rate=factor), digits)


def _rules() -> Iterator[str]:
    """Yield the losses of rules that compute a multiplier."""
    runs = read_json("training/results/2026-11-24-factor-rates/results.json")["runs"]

    def loss(rule: str) -> str:
        some = select(runs, rule=rule, optimizer="SGD momentum 0.9, lr 0.05")
        return spread([run["readings"]["20"]["test_loss"] for run in some], 3)

    rules = {
        run["rule"]: select(runs, rule=run["rule"], optimizer=run["optimizer"]) for run in runs
    }
    yield f"({number(*rules.values())} seeds, a perceptron"
    _, early, *_, last = map(int, runs[0]["readings"])
    yield (
        f"under SGD, {loss('spectral')} against {loss('none')} after {early} steps, and no rule "
        f"differed from none after {last} steps"
    )
    yield f"was worse after {early} steps ({loss('rms')})"
