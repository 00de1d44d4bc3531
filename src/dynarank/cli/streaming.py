"""A table that prints each row as it is added, with a progress bar in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from dynarank.files.printable import printable

__all__ = ["Column", "StreamedTable"]

_CELL = 6  # the minimum width of a number
_LONGEST = 1_000  # characters of a name
_NAME = 12  # the minimum width to which long names are shortened
_ALIGNED = 64  # the width that names fill outside a terminal; longer ones push their row


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        heading: its heading.
        width: the least width of a cell.
        rank: in a terminal that is too narrow, the columns of the highest rank are left out first.
        left: whether its cells are aligned left.
    """

    heading: str
    width: int = _CELL
    rank: int = 0
    left: bool = False

    @property
    def cells(self) -> int:
        """The width of the column."""
        return max(self.width, cell_len(self.heading))


class StreamedTable:
    """Prints rows of a name and cells as they come, with fixed column widths.

    In a narrow terminal columns are left out, by their ranks, and long names are shortened in the
    middle. Output to a file or pipe is never shortened.

    Args:
        out: the console to print on.
        title: printed first; None: no table, only the progress bar.
        columns: the columns after the name.
        names: all names in order, one per row.
        work: how much there is to do for each row, in any unit: the time left is its share.
    """

    def __init__(
        self,
        out: Console,
        title: str | None,
        columns: Sequence[Column],
        names: Sequence[str],
        work: Sequence[float],
    ) -> None:
        self._out, self._title, self._columns = out, title, columns
        longest = max(5, *(cell_len(printable(name, _LONGEST)) for name in names))
        self._shown = [True] * len(columns)
        self._limit = _LONGEST
        self._name = min(longest, _ALIGNED)
        if out.is_terminal:
            self._limit = self._name = self._fit(min(longest, _ALIGNED), longest)
        self._progress = Progress(
            BarColumn(bar_width=min(24, max(out.width // 4, 4))),
            TextColumn("{task.fields[place]}"),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=out,
            transient=True,
            disable=not out.is_terminal,
        )
        self._work, self._done = list(work), 0
        total = sum(self._work)
        self._task = self._progress.add_task("", total=total, note="", place=f"0/{len(names)}")

    def __enter__(self) -> StreamedTable:
        if self._title is not None:
            self._print(Text(printable(self._title, _LONGEST), style="bold"))
            self._line("layer", [column.heading for column in self._columns], style="bold")
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def working_on(self, name: str) -> None:
        """Show in the progress bar what is being read."""
        note = _cut(printable(name, _LONGEST), max(self._out.width - 40, 8))
        self._progress.update(self._task, note=note)

    def add(self, name: str, cells: Sequence[str]) -> None:
        """Print a row, and advance the progress bar."""
        if self._title is not None:
            self._line(name, cells)
        place = f"{self._done + 1}/{len(self._work)}"
        self._progress.update(self._task, advance=self._work[self._done], place=place)
        self._done += 1

    def _fit(self, wanted: int, longest: int) -> int:
        """Leave out columns until names have room; the width of the names."""
        for rank in sorted({column.rank for column in self._columns}, reverse=True):
            if self._left() >= min(wanted, max(_NAME, self._out.width // 3)):
                break
            if rank:
                self._shown = [c.rank < rank for c in self._columns]
        return max(min(longest, self._left()), 5)

    def _left(self) -> int:
        shown = [c for c, kept in zip(self._columns, self._shown, strict=True) if kept]
        return self._out.width - sum(column.cells + 1 for column in shown)

    def _line(self, name: str, cells: Sequence[str], style: str = "") -> None:
        name = _cut(printable(name, _LONGEST), self._limit)
        words = [_padded(name, self._name, left=True)]
        for cell, column, shown in zip(cells, self._columns, self._shown, strict=True):
            if shown:
                words.append(_padded(cell, column.cells, column.left))
        self._print(Text(" ".join(words).rstrip(), style=style))

    def _print(self, text: Text) -> None:
        self._progress.console.print(text, soft_wrap=True)


def _padded(text: str, width: int, left: bool) -> str:
    space = " " * max(width - cell_len(text), 0)
    return text + space if left else space + text


def _cut(name: str, width: int) -> str:
    """Shorten a name in the middle if it is wider."""
    keep = len(name)
    while cell_len(name) > width and keep > 1:
        keep -= 1
        head = (keep - 1) // 3
        shorter = f"{name[:head]}…{name[len(name) - (keep - 1 - head) :]}"
        if cell_len(shorter) <= width:
            return shorter
    return name
