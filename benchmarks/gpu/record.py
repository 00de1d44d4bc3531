"""``results.json``: rewritten whole after each row, so that it is valid whenever the run is killed.

``{"format": 1, "about": {...}, "parts": {name: {"status", "seconds", "rows": {key: {...}}, ...}}}``
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "Record"]

FORMAT = 1


class Record:
    """The results in a folder.

    Args:
        folder: where ``results.json`` is, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.json"
        folder.mkdir(parents=True, exist_ok=True)
        start: dict[str, Any] = {"format": FORMAT, "about": {}, "parts": {}}
        self.data = json.loads(self.path.read_text()) if self.path.exists() else start

    def about(self, **values: Any) -> None:
        """Record something about the whole run."""
        self.data["about"] |= values
        self.write()

    def part(self, name: str, **values: Any) -> None:
        """Record something about a part."""
        self.data["parts"].setdefault(name, {"rows": {}}).update(values)
        self.write()

    def row(self, part: str, key: str, values: Mapping[str, Any]) -> None:
        """Record values of a row; those that it had already stay."""
        self.data["parts"][part]["rows"].setdefault(key, {}).update(values)
        self.write()

    def running(self) -> Iterator[str]:
        """The parts that began and did not end."""
        return (k for k, part in self.data["parts"].items() if part["status"] == "running")

    def write(self) -> None:
        """Replace the file, at once."""
        beside = self.path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(_plain(self.data), indent=1, allow_nan=False) + "\n")
        beside.replace(self.path)


def _plain(value: Any) -> Any:
    """The value as JSON can have it: six digits, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if isinstance(value, int | str | type(None)) else str(value)
