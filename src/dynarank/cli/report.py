"""``dynarank report``: the HTML page of a run, and its figures as files."""

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
    out: Annotated[Path | None, typer.Option(help="Where to; default: RUN/report.html.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure to a file in this folder.")
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", help="Of those files: png, svg, pdf or several.")
    ] = "png,svg",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the page's path and the runs' figures as JSON.")
    ] = False,
) -> None:
    """Write one self-contained HTML page about a RUN, or about several side by side.

    Scores and losses with the phases shaded; the form, lambda and effective rank of every layer
    over time; one layer's singular values and weights moved through time by a slider; costs, and
    what can be told apart at this number of runs. It needs no network and can be sent as one file.
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
