"""``dynarank report``: the HTML report of runs, and its figures as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dynarank.records import find_runs, read_run
from dynarank.report import write_report
from dynarank.report.figures import write_figures

__all__ = ["report"]


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
    written = write_figures(run, figures, asked) if figures is not None else []
    page = write_report(run, out)
    if not as_json:
        print(*(page, *written), sep="\n")
        return
    runs = [read_run(folder) for folder in find_runs(run)]
    told = [
        {"folder": str(one.folder), **one.header.model_dump(include={"recipe", "schedule", "seed"}),
         "summary": one.summary.model_dump() if one.summary else None}
        for one in runs
    ]  # fmt: skip
    answer = {"report": str(page), "figures": [str(path) for path in written], "runs": told}
    print(json.dumps(answer, indent=2))
