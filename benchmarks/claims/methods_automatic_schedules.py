"""Automatic schedules: the rule for the transition points, and runs under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import cos, pi

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from dynarank.schedules import lr_aligned

from .methods_shared import accuracies, distinct, flops, number, row, spread, summaries, verdict
from .records import read_json

PAGE = "docs/methods/automatic-schedules.md"
SETTINGS: tuple[str, ...] = ()
STEPS = 10_000
DIGITS = "2026-11-24-digits-schedules"
PUBLISHED = (
    ("CIFAR-10, 150 epochs, decays at 100 and 130", 150, (100, 130), "55, 120"),
    ("CIFAR-100, 200 epochs, decays at 150 and 180", 200, (150, 180), "80, 170"),
)
CURVES: dict[str, Callable[[float], float]] = {
    "cosine to zero": lambda t: 1 + cos(pi * t),
    "linear warm-up over a tenth, linear decay": lambda t: min(t / 0.1, (1 - t) / 0.9),
    "warm-up, stable to 80%, decay": lambda t: min(t / 0.1, 1, (1 - t) / 0.2),
}


def claims() -> Iterator[str]:
    """Yield the figures as the page has them."""
    before, after = lr_aligned.BEFORE, lr_aligned.AFTER
    yield f"full-rank from {1 - before:.2f} d to d + {after:.1f} (1 - d)"
    for name, epochs, decays, published in PUBLISHED:
        rates = [0.1 ** sum(epoch >= decay for decay in decays) for epoch in range(epochs)]
        decay, window = _window(rates)
        derived = ", ".join(f"{epochs * time:.0f}" for time in window)
        yield row(name, f"{decay:.3f}", derived, published)
    forecasts = {name: [rate(i / STEPS) for i in range(STEPS)] for name, rate in CURVES.items()}
    for name, rates in (forecasts | {"one cycle": _one_cycle()}).items():
        decay, window = _window(rates)
        yield row(name, f"{decay:.2f}", ", ".join(f"{time:.2f}" for time in window), "")
    begin, _ = lr_aligned.full_rank_window(None)
    yield f"full rank begins at {begin:.2f} of the run"
    yield f"when {after:.0%} of the time after the decay has passed, or at {lr_aligned.LATEST}"
    yield f"On the digits, 12 epochs, {number(*summaries(DIGITS).values())} ("
    yield _digits()
    yield from _fashion()


def _window(rates: Sequence[float]) -> tuple[float, tuple[float, float]]:
    decay = lr_aligned.decisive_decay(tuple(rates))
    assert decay is not None
    return decay, lr_aligned.full_rank_window(decay)


def _one_cycle() -> list[float]:
    optimizer = SGD(nn.Linear(1, 1).parameters())
    scheduler = OneCycleLR(optimizer, 1.0, total_steps=STEPS)
    rates: list[float] = []
    for _ in range(STEPS):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return rates


def _digits() -> str:
    runs = summaries(DIGITS)
    scores = accuracies(runs)
    full, low, aligned = (spread(scores[name], 2) for name in ("full-rank", "low-rank", "aligned"))
    cost = f"{flops(runs['aligned'])} of the full-rank FLOPs"
    return f"{aligned} % at {cost}, full rank {full}, low rank {low}: {verdict(runs)}"


def _fashion() -> Iterator[str]:
    folder = "2026-11-24-recipes/fashion-mnist-mlp"
    config = read_json(f"training/results/{folder}/common.json")
    runs = summaries(folder)
    n = number(*runs.values())
    yield f"({config['train_limit']:,} images, {config['epochs']} epochs, {n},"
    scores = accuracies(runs)
    full, low, dynamic, last = (spread(group, 2) for group in scores.values())
    yield f"full rank has {full} %, low rank at an eighth {low}"
    yield f"dynamic rank {dynamic} at {flops(runs['dynamic-rank'])}"
    yield f"deflating to low-rank {last} at {flops(runs['dynamic-rank-low'])}"
    names = {"full-rank": "full rank", "dynamic-rank-low": "the last"}
    differ = [" and ".join(names.get(name, name) for name in pair) for pair in distinct(runs)]
    yield f"only {', '.join(differ)} differ significantly"
