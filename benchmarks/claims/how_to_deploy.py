"""Deploy: latency and size of full, merged and factored networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .records import only, read_json

PAGE = "docs/how-to/deploy.md"
NETWORKS = ("wide MLP", "narrow MLP", "ConvNet", "encoder, 32 tokens")
BATCHES = (1, 64)
SETTINGS: tuple[str, ...] = ()


def claims() -> Iterator[str]:
    """Yield the table and the ratios that the text names."""
    for network in NETWORKS:
        for batch in BATCHES:
            sizes = [f"{one(network, kind)['bytes'] / 1e6:.2f}" for kind in ("merged", "factored")]
            yield (
                f"| {network} | {batch} | {latency(network, batch, 'eager')} "
                f"| {latency(network, batch, 'onnxruntime')} | {' / '.join(sizes)} MB |"
            )
    yield f"medians of n = {one('wide MLP', 'full')['ms']['n']} timings"
    yield (
        f"the wide MLP takes {ratio('wide MLP', 64):.2f} of the time in batches of 64 "
        f"and {ratio('wide MLP', 1):.2f} at batch 1"
    )
    yield f"takes {ratio('narrow MLP', 1):.1f} times as long at batch 1"


def one(network: str, kind: str, batch: int = 1, engine: str = "onnxruntime") -> Any:
    """Return one row of the record."""
    rows = read_json("deploy/results/2026-11-29-cpu/deploy.json")["rows"]
    return only(rows, network=network, kind=kind, batch=batch, engine=engine)


def median(network: str, kind: str, batch: int, engine: str) -> float:
    """Return the median latency in milliseconds."""
    return one(network, kind, batch, engine)["ms"]["median"]


def latency(network: str, batch: int, engine: str) -> str:
    """Return the three latencies with two digits."""
    times = [median(network, kind, batch, engine) for kind in ("full", "merged", "factored")]
    return " / ".join(f"{time:.2g}" if time < 10 else f"{time:.0f}" for time in times) + " ms"


def ratio(network: str, batch: int) -> float:
    """Return how long the factored network takes relative to the merged one, in eager torch."""
    full, factored = (median(network, kind, batch, "eager") for kind in ("merged", "factored"))
    return factored / full
