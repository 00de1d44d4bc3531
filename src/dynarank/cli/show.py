"""Terminal output: the console and tables."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["console", "print_json", "print_whole_words", "progress", "right_aligned"]


_NO_LIMIT = 1000  # columns: a file or a pipe gets every name whole, and a sentence a line


def console(*, quiet_stdout: bool = False) -> Console:
    """A console on stdout, or on stderr when stdout is for JSON.

    Lines fit the terminal, or ``COLUMNS``; what is neither a terminal nor given them has no limit.
    """
    if quiet_stdout and not isinstance(sys.stdout, _Apart):
        sys.stdout = cast("TextIO", _Apart(sys.stdout))
    stream = cast("TextIO", sys.stderr if quiet_stdout else sys.stdout)
    file = cast("TextIO", _Lasting(stream))
    out = Console(file=file, highlight=False)
    if not out.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        out.width = _NO_LIMIT
    return out


class _Apart:
    """stdout while it is for JSON: what a user's own code prints goes to stderr."""

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def print_json(data: Any) -> None:
    """Print the answer of a command to stdout, as JSON."""
    print(json.dumps(data, indent=2), file=getattr(sys.stdout, "answers", sys.stdout))


def progress(terminal: Console, quiet: bool) -> Console:
    """Where progress is shown: the console of the results, or nowhere."""
    return Console(file=io.StringIO(), quiet=True) if quiet else terminal


class _Lasting:
    """A stream that may be closed (``| head``, a terminal), or full: no run ends for that."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._stream.flush()

    @contextmanager
    def _lasting(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # nobody reads it any more
                with suppress(OSError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self._stream.fileno())
                    os.close(nowhere)


def right_aligned(title: str, first: list[str], numbers: list[str]) -> Table:
    """A table with columns of text first, then columns of numbers, aligned right.

    In a narrow terminal headings and numbers are wrapped, never cut.
    """
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    for name in first:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def print_whole_words(terminal: Console, table: Table) -> None:
    """Print a table; in a narrow terminal headings are wrapped between words, if that is enough.

    If it is not, cells are too, in as few columns as possible.
    """
    cells = [[str(cell) for cell in (c.header, *c.cells)] for c in table.columns]
    words = [max(len(word) for cell in one for word in cell.split()) for one in cells]
    whole = [max(map(len, [*one[0].split(), *one[1:]])) for one in cells]
    room = terminal.width - 2 * (len(cells) - 1)  # two characters between columns
    least = whole
    for column in sorted(range(len(cells)), key=lambda at: words[at] - whole[at]):
        if sum(least) > room:
            least[column] = words[column]
    spare = room - sum(least)
    if spare >= 0:
        for column, texts, width in zip(table.columns, cells, least, strict=True):
            more = min(max(map(len, texts)) - width, spare)
            column.width, spare = width + more, spare - more
            column.no_wrap = False
    terminal.print(table)
