"""Checkpoints: limits of the format, and how many trials the tests make."""

from __future__ import annotations

from collections.abc import Iterator

from dynarank.checkpoint.folder import _SPARE
from dynarank.files.json_data import MAX_BYTES

PAGE = "docs/checkpoints.md"
SETTINGS = (
    "| `kill -9` at random times, then resumed | 200 |",
    "| bit and byte flips over all files; cuts | 3,000; 500 |",
    "| ENOSPC, EIO, EDQUOT, EROFS at every system call | 4 x every call |",
    "torchrun restarts | 2; 10 |",
    "| mutated manifests and JSON (hypothesis) | 10,000 |",
    "| JSON bombs of 60 MB, under a limit of 1 GiB | 12 |",
)


def claims() -> Iterator[str]:
    """Yield the limits that the code has."""
    yield f"JSON is read up to {MAX_BYTES >> 20} MiB"
    yield f"({_SPARE} times the size must be free)"
