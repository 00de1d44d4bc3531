"""Execution: the speed of a small convolution."""

from __future__ import annotations

from collections.abc import Iterator

from .records import only, read_json

PAGE = "docs/methods/execution.md"
SETTINGS = ("more than 2% of the layer",)


def claims() -> Iterator[str]:
    """Yield the speed of a small convolution."""
    layers = read_json("layers/results/2026-11-24-cpu/layers.json")["rows"]
    one = only(layers, layer="conv 3x3, 16 channels, 32x32, batch 32", share="1/8")
    times = {form: measured["median"] for form, measured in one["ms"].items()}
    faster = times["full-rank"] / times["factored"]
    yield f"is {faster:.2f} times as fast with {one['flop_ratio']:.1f} times fewer FLOPs"
