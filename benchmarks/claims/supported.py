"""What is supported: the largest cluster of the cost model's tables."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.scale.tables import GPUS

PAGE = "docs/supported.md"
SETTINGS: tuple[str, ...] = ()


def claims() -> Iterator[str]:
    """Yield the number of GPUs."""
    yield f"what each of up to {max(GPUS):,} GPUs holds and sends"
