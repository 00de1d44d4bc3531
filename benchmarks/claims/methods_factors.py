"""docs/methods/factors.md."""

from __future__ import annotations

from collections.abc import Iterator

from .methods_shared import row, spread
from .records import Row, mean, only, read_json, read_lines, select, values

PAGE = "docs/methods/factors.md"
SETTINGS = ("arXiv 2105.01029",)
PERCEPTRON = "perceptron 784-256-256-256-10, Fashion-MNIST, rank 16, AdamW; test accuracy, %"
GPT = "character GPT, width 64, rank 16, AdamW, 200 steps; validation loss"
RATES = {"fash": 0.002, "lm2": 0.012}  # records have factors of these


def claims() -> Iterator[str]:
    """Yield the figures as the page has them."""
    runs = read_lines("training/results/2026-11-28-factors/runs.jsonl")
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
    for start in ("truncated", "norm"):
        yield spread(values(runs, result, start=start, rate=factor), digits)


def _rules() -> Iterator[str]:
    """Yield the losses of rules that compute a multiplier."""
    rows = read_json("training/results/2026-11-24-factor-rates/results.json")["summary"]
    losses = {}
    for rule in ("none", "spectral", "rms"):
        one = only(rows, rule=rule, optimizer="SGD momentum 0.9, lr 0.05")
        losses[rule] = "{:.3f} ± {:.3f}".format(*one["test_loss@20"])
    yield f"under SGD, {losses['spectral']} against {losses['none']} after 20 steps"
    yield f"was worse after 20 steps ({losses['rms']})"
