"""Reading the records: files once each, means and spreads over the runs that fields select."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dynarank.records import Run, find_runs, read_run

BENCHMARKS = Path(__file__).parents[1]
Row = Mapping[str, Any]


@cache
def read_json(path: str) -> Any:
    """Read a JSON record, by its path in `benchmarks/`."""
    return json.loads((BENCHMARKS / path).read_text(encoding="utf-8"))


@cache
def read_lines(path: str) -> list[dict[str, Any]]:
    """Read a record of one JSON object a line, by its path in `benchmarks/`."""
    lines = (BENCHMARKS / path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


@cache
def read_runs(folder: str) -> list[Run]:
    """Read the run folders below a folder of `benchmarks/`."""
    return [read_run(run) for run in find_runs(BENCHMARKS / folder)]


def select(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """Return the rows with these fields; it is an error if there are none."""
    found = [row for row in rows if all(row.get(k) == v for k, v in fields.items())]
    if not found:
        raise LookupError(f"no record with {fields}")
    return found


def only(rows: Iterable[Row], **fields: Any) -> Row:
    """Return the one row with these fields."""
    found = select(rows, **fields)
    if len(found) > 1:
        raise LookupError(f"{len(found)} records with {fields}, not one")
    return found[0]


def values(rows: Iterable[Row], name: str, **fields: Any) -> list[float]:
    """Return one field of the rows with these fields, for `mean` and `deviation`."""
    return [float(row[name]) for row in select(rows, **fields)]


def mean(numbers: Iterable[float]) -> float:
    """Return the mean."""
    return fmean(numbers)


def deviation(numbers: Iterable[float]) -> float:
    """Return the sample standard deviation."""
    return stdev(numbers)
