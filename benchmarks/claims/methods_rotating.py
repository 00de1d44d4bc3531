"""Rotating inflation: runs under it."""

from __future__ import annotations

from collections.abc import Iterator

from .methods_shared import accuracies, flops, number, spread, summaries, verdict

PAGE = "docs/methods/rotating.md"
SETTINGS: tuple[str, ...] = ()


def claims() -> Iterator[str]:
    """Yield the figures as the page has them."""
    runs = summaries("2026-11-24-digits-schedules")
    yield f"On the digits, 12 epochs, {number(*runs.values())} ("
    scores = {name: spread(group, 2) for name, group in accuracies(runs).items()}
    peak = {name: f"{group[0].trainable_parameters_peak:,}" for name, group in runs.items()}
    yield f"{scores['rotating']} % at {flops(runs['rotating'])} of full-rank FLOPs"
    yield f"a peak of {peak['rotating']} trainable parameters"
    yield f"{scores['full-rank']} for full rank ({peak['full-rank']})"
    yield f"{scores['low-rank']} for low rank ({peak['low-rank']}): {verdict(runs)}"
