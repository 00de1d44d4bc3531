"""``dynarank report``: the HTML report of runs, and its figures as files."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dynarank.files.printable import printable
from dynarank.records import read_runs
from dynarank.report import write_report
from dynarank.report.figures import write_figures

__all__ = ["report"]

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of runs to compare.")],
    out: Annotated[Path | None, typer.Option(help="Output file; default: RUN/report.html.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure to a file in this folder.")
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", help="Formats of those files: png, svg, pdf.")
    ] = "png,svg",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the paths and the runs' summaries as JSON.")
    ] = False,
) -> None:
    """Write one self-contained HTML page about RUN, or about several runs side by side.

    Scores and losses with the phases shaded; the form, lambda and effective rank of every layer
    over time; one layer's singular values and weights with a time slider; costs, and which
    differences are significant. The page needs no network and is a single file.
    """
    asked = [name.strip().lower() for name in formats.split(",") if name.strip()]
    warnings: dict[str, None] = {}  # each once
    written: list[Path] = []
    if figures is not None:
        written = write_figures(run, figures, asked, warn=warnings.setdefault)
    try:
        page = write_report(run, out, warn=warnings.setdefault)
    except OSError as error:
        if out is not None or error.errno not in _READ_ONLY:
            raise
        told = f"{error.strerror}; name another file with --out"
        raise OSError(error.errno, told, error.filename) from error
    for told in warnings:
        print(f"dynarank: warning: {printable(told, 500)}", file=sys.stderr)
    if not as_json:
        print(*(page, *written), sep="\n")
        return
    told = [
        {"folder": str(one.folder), **one.header.model_dump(include={"recipe", "schedule", "seed"}),
         "summary": one.summary.model_dump() if one.summary else None}
        for one in read_runs(run)[0]
    ]  # fmt: skip
    answer = {"report": str(page), "figures": [str(path) for path in written], "runs": told,
              "warnings": list(warnings)}  # fmt: skip
    print(json.dumps(answer, indent=2))
