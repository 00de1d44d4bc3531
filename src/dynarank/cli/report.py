"""``dynarank report``: the HTML page of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dynarank.records import find_runs, read_run
from dynarank.report import write_report

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of runs to compare.")],
    out: Annotated[Path | None, typer.Option(help="Where to; default: RUN/report.html.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the page's path and the runs' figures as JSON.")
    ] = False,
) -> None:
    """Write one self-contained HTML page about a RUN, or about several side by side.

    Accuracy and loss, lambda and effective rank per layer over time with the changes of form
    marked, phases, and the cost table. It needs no network and can be sent as one file.
    """
    page = write_report(run, out)
    if not as_json:
        print(page)
        return
    runs = [read_run(folder) for folder in find_runs(run)]
    figures = [
        {"folder": str(one.folder), **one.header.model_dump(include={"recipe", "schedule", "seed"}),
         "summary": one.summary.model_dump() if one.summary else None}
        for one in runs
    ]  # fmt: skip
    print(json.dumps({"report": str(page), "runs": figures}, indent=2))
