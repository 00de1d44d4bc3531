"""The arguments of the command."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu.timetable import SHARES

__all__ = ["parser"]


def parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    made = argparse.ArgumentParser("python -m benchmarks.gpu")
    made.add_argument("--out", type=Path, required=True, help="an empty folder, for results.json")
    made.add_argument("--minutes", type=float, default=9.0, help="the time for everything")
    made.add_argument("--data", type=Path, help="a folder with books/split/; none: sources")
    made.add_argument("--toy", action="store_true", help="the smallest sizes, to try the code")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument(
        "--parts", type=_parts, default=list(SHARES), help=f"some of {','.join(SHARES)}"
    )
    return made


def _parts(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(SHARES):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return [name for name in SHARES if name in text.split(",")]
