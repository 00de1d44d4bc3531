"""The arguments of the command."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu.timetable import SHARES
from benchmarks.positive import positive

__all__ = ["parser"]


def parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description="Measure on one GPU, the most valuable part first; DIR/results.json is written "
        "after each row. benchmarks/gpu/README.md says what the parts are.",
    )
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty folder")
    made.add_argument(
        "--minutes", type=positive(float), default=9.0, help="for everything; %(default)g"
    )
    made.add_argument("--data", type=Path, help="a folder with books/split/; none: these sources")
    made.add_argument("--toy", action="store_true", help="the smallest sizes, to try the code")
    made.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cuda; cpu with --toy"
    )
    made.add_argument(
        "--parts",
        type=_parts,
        default=",".join(SHARES),
        metavar="A,B",
        help=f"only some of {','.join(SHARES)}",
    )
    return made


def _parts(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(SHARES):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return [name for name in SHARES if name in text.split(",")]
