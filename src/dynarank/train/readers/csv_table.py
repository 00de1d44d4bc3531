"""A table in a .csv file: numeric columns are standardized, the others one-hot.

Legend: rows are counted as a spreadsheet does, the header is row 1.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynarank.files.printable import printable
from dynarank.train.readers.splits import check_share, find, split
from dynarank.train.sources import DataError, read_utf8

__all__ = ["read"]

_MOST_CLASSES = 100  # whole numbers of more values than these may be counts: the user must say
_MISSING = {"na", "n/a", "nan", "null", "none", "?", "-", "nil", "missing"}
_MOST_CATEGORIES = 1000  # a column with more is text or a key


def read(
    place: str,
    folder: Path,
    *,
    target: str | None = None,
    task: str | None = None,
    test: str | None = None,
    test_share: float = 0.2,
    drop: Sequence[str] = (),
    categorical: Sequence[str] = (),
    delimiter: str = ",",
) -> Any:
    """Read a table with a header; inputs are float32 ``(N, features)``.

    Args:
        place: the file, relative to ``folder``.
        folder: the recipe's folder.
        target: the column to predict; None: the last one.
        task: ``classification`` or ``regression``; None: by the target: fractions are regression,
            words and whole numbers classes.
        test: a file with the test rows; None: a fixed share of the rows is held out.
        test_share: that share.
        drop: columns to leave out.
        categorical: numeric columns whose values are categories.
        delimiter: what separates the cells.

    Raises:
        DataError: the file is empty, a row is ragged, a value is missing, a column does not exist.
    """
    tables = [_read_table(find(one, folder), delimiter) for one in (place, test) if one is not None]
    if len(tables) > 1 and tables[0].header != tables[1].header:
        raise DataError(f"{tables[1].path} has other columns than {tables[0].path}")
    header = tables[0].header
    target = header[-1] if target is None else target
    for name in (target, *drop, *categorical):
        if name not in header:
            raise DataError(f"{tables[0].path} has no column {name!r}; it has {', '.join(header)}")
    rows = _Rows(tables)
    y = _target(rows, target, task, target in categorical)
    held = check_share("test_share", test_share)
    if test is None:
        train, rest = split(y, held)
    else:
        first = len(tables[0].rows)
        train, rest = torch.arange(first), torch.arange(first, len(y))
    names = [name for name in header if name != target and name not in drop]
    if not names:
        raise DataError(f"{tables[0].path} has no column but the target {target!r}")
    x = torch.cat([_features(rows, name, name in categorical, train) for name in names], 1)
    return (x[train], y[train]), (x[rest], y[rest])


class _Table:
    """A header and the rows below it, with their numbers."""

    def __init__(self, path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> None:
        self.path, self.header, self.rows = path, header, rows


class _Rows:
    """The rows of one or two tables."""

    def __init__(self, tables: Sequence[_Table]) -> None:
        self.header = tables[0].header
        self._rows = [(table.path, *row) for table in tables for row in table.rows]

    def column(self, name: str) -> list[str]:
        """The cells of a column; none is empty."""
        at = self.header.index(name)
        cells = [row[at].strip() for _, _, row in self._rows]
        for index, cell in enumerate(cells):
            if not cell:
                raise DataError(
                    f"{self.place(index)}, column {name!r} is empty; fill it in, or leave the row "
                    "or the column out (drop)"
                )
        return cells

    def place(self, index: int) -> str:
        """Where a row is."""
        path, number, _ = self._rows[index]
        return f"{path}, row {number}"


def _read_table(path: Path, delimiter: str) -> _Table:
    text = read_utf8(path, "utf-8-sig")
    try:
        lines = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
    except (csv.Error, TypeError) as error:
        raise DataError(f"{path} is not a table separated by {delimiter!r}: {error}") from error
    rows = [(number, row) for number, row in enumerate(lines, start=1) if row]
    if len(rows) < 2:
        raise DataError(f"{path} has no rows below its header")
    header = [cell.strip() for cell in rows[0][1]]
    if any(_number(cell) is not None for cell in header):
        raise DataError(f"{path} has no header: its first row is {printable(', '.join(header))}")
    if len(set(header)) < len(header) or "" in header:
        raise DataError(f"{path}: every column needs a name of its own, got {', '.join(header)}")
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(
                f"{path}, row {number} has {len(row)} cells, the header {len(header)}: "
                f"{printable(delimiter.join(row))[:80]}"
            )
    return _Table(path, header, rows[1:])


def _number(cell: str) -> float | None:
    with suppress(ValueError):
        return float(cell)
    return None


def _numbers(rows: _Rows, name: str) -> Tensor | None:
    """A numeric column as float64; None: it has words.

    Raises:
        DataError: a number is not finite, or a few cells among numbers are none.
    """
    cells = rows.column(name)
    values = [_number(cell) for cell in cells]
    words = [index for index, value in enumerate(values) if value is None]
    _check_words(rows, name, cells, words)
    if len(words) > len(cells) // 10:
        return None
    wrong = words or [i for i, value in enumerate(values) if not math.isfinite(value or 0.0)]
    if wrong:
        raise DataError(
            f"{rows.place(wrong[0])}, column {name!r} is {printable(cells[wrong[0]])!r}, among "
            "numbers; correct it, leave it out (drop), or name the column in categorical"
        )
    return torch.tensor(values, dtype=torch.float64)


def _check_words(rows: _Rows, name: str, cells: list[str], words: list[int]) -> None:
    """Refuse words that mean numbers: as categories, they would train something else."""
    found = {cells[index].lower() for index in words}
    if not found:
        return
    first = f"{rows.place(words[0])}, column {name!r} is {printable(cells[words[0]])!r}"
    if found <= _MISSING and len(words) < len(cells):
        raise DataError(
            f"{first}, a missing number; fill it in, leave the row or the column out (drop), or "
            "name the column in categorical"
        )
    if all(_number(word.replace(",", ".", 1)) is not None for word in found):
        raise DataError(
            f"{first}: write decimal points, no commas, or name the column in categorical"
        )


def _features(rows: _Rows, name: str, is_category: bool, train: Tensor) -> Tensor:
    """A column as features: ``(N, 1)``, standardized by the training rows, or one-hot."""
    values = None if is_category else _numbers(rows, name)
    if values is None:
        codes, known = _codes(rows, name)
        return torch.nn.functional.one_hot(codes, known).float()
    mean, std = values[train].mean(), values[train].std(correction=0)
    return ((values - mean) / (std if std > 0 else 1.0)).float()[:, None]


def _codes(rows: _Rows, name: str) -> tuple[Tensor, int]:
    cells = rows.column(name)
    known = {cell: code for code, cell in enumerate(sorted(set(cells)))}
    if len(known) > _MOST_CATEGORIES:
        raise DataError(
            f"column {name!r} has {len(known)} different words, at most {_MOST_CATEGORIES} become "
            "features; leave it out (drop)"
        )
    return torch.tensor([known[cell] for cell in cells]), len(known)


def _target(rows: _Rows, name: str, task: str | None, is_category: bool) -> Tensor:
    """Classes from 0, or real numbers."""
    if task not in (None, "classification", "regression"):
        raise DataError(f"task is classification or regression, got {task!r}")
    values = None if is_category or task == "classification" else _numbers(rows, name)
    if values is None and task == "regression":
        raise DataError(f"column {name!r} has words: it is no target of a regression")
    if values is not None and (task == "regression" or bool((values % 1 != 0).any())):
        return values.float()
    codes, known = _whole(values) if values is not None else _codes(rows, name)
    if known < 2:
        raise DataError(f"column {name!r} has one class, {rows.column(name)[0]!r}; 2 or more")
    if task is None and values is not None and known > _MOST_CLASSES:
        raise DataError(
            f"column {name!r} has {known} different whole numbers: set task to classification or "
            "to regression"
        )
    return codes


def _whole(values: Tensor) -> tuple[Tensor, int]:
    known, codes = values.unique(return_inverse=True)
    return codes, len(known)
