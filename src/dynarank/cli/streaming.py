"""A table that prints each row as it is added, with a progress bar in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from dynarank.files.printable import printable

__all__ = ["StreamedTable"]

_CELL = 6  # the minimum width of a number
_LONGEST = 1_000  # characters of a name
_NAME = 24  # the minimum width to which long names are shortened


class StreamedTable:
    """Prints rows of a name, a shape and cells as they come, with fixed column widths.

    In a narrow terminal long names are shortened in the middle. Output to a file or pipe is never
    shortened.

    Args:
        out: the console to print on.
        title: printed first; None: no table, only the progress bar.
        columns: the headings of the cells, which are aligned right.
        names: all names in order, one per row.
        shapes: all shapes.
    """

    def __init__(
        self,
        out: Console,
        title: str | None,
        columns: Sequence[str],
        names: Sequence[str],
        shapes: Sequence[str],
    ) -> None:
        self._out, self._title, self._columns = out, title, columns
        self._widths = [max(_CELL, len(heading)) for heading in columns]
        self._shape = max(5, *map(len, shapes))
        self._name = max(5, *(len(printable(name, _LONGEST)) for name in names))
        if out.is_terminal:
            left = out.width - self._shape - sum(self._widths) - len(columns) - 1
            self._name = min(self._name, max(left, _NAME))
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=out,
            transient=True,
            disable=not out.is_terminal,
        )
        self._task = self._progress.add_task("", total=len(names), note="")

    def __enter__(self) -> StreamedTable:
        if self._title is not None:
            self._print(Text(printable(self._title, _LONGEST), style="bold"))
            self._line("layer", "shape", self._columns, style="bold")
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
        self._progress.update(self._task, note=printable(name, _LONGEST))

    def add(self, name: str, shape: str, cells: Sequence[str]) -> None:
        """Print a row, and advance the progress bar."""
        if self._title is not None:
            self._line(name, shape, cells)
        self._progress.advance(self._task)

    def _line(self, name: str, shape: str, cells: Sequence[str], style: str = "") -> None:
        figures = (cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))
        name = printable(name, _LONGEST)
        words = f"{_cut(name, self._name):<{self._name}} {shape:<{self._shape}}"
        self._print(Text(f"{words} {' '.join(figures)}".rstrip(), style=style))

    def _print(self, text: Text) -> None:
        self._progress.console.print(text, soft_wrap=True)


def _cut(name: str, width: int) -> str:
    """Shorten a name in the middle if it is too long."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"
