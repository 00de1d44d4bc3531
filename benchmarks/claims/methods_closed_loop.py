"""Closed-loop schedule: its default thresholds, and runs under it."""

from __future__ import annotations

from collections.abc import Iterator

from dynarank.schedules import closed_loop

from .methods_shared import accuracies, flops, number, spread, summaries, verdict

PAGE = "docs/methods/closed-loop.md"
SETTINGS: tuple[str, ...] = ()


def claims() -> Iterator[str]:
    """Yield the figures as the page has them."""
    defaults = closed_loop(0.25)
    low, high = 1 - defaults.fall, defaults.saturation
    yield f"effective rank stays between {low:.2f} and {high:.2f} of its rank"
    runs = summaries("2026-11-24-digits-schedules")
    scores = accuracies(runs)
    yield f"On the digits, 12 epochs, {number(*runs.values())} ("
    closed, aligned, full = (
        spread(scores[name], 2) for name in ("closed-loop", "aligned", "full-rank")
    )
    yield f"{closed} % at {flops(runs['closed-loop'])} of full-rank FLOPs"
    yield f"{aligned} at {flops(runs['aligned'])} for transition points from the learning rate"
    yield f"{full} for full rank: {verdict(runs)}"
