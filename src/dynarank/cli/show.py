"""Terminal output: the console, tables, and the live progress of a run."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TextIO, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from dynarank.forms import Change, form_name
from dynarank.records import EpochRecord, Metric
from dynarank.report.formats import plural, score_text, seconds_text
from dynarank.train.listener import Progress

__all__ = ["ProgressListener", "console", "print_whole_words", "progress_text", "right_aligned"]


def console(*, quiet_stdout: bool = False) -> Console:
    """A console on stdout, or on stderr when stdout is for JSON; 120 columns if not a terminal."""
    file = cast("TextIO", _Lasting(sys.stderr if quiet_stdout else sys.stdout))
    out = Console(file=file, highlight=False)
    return out if out.is_terminal else Console(file=file, highlight=False, width=120)


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
        collapse_padding=True,
    )
    for name in first:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def print_whole_words(terminal: Console, table: Table) -> None:
    """Print a table; in a narrow terminal cells are wrapped between words, if that is enough."""
    cells = [[str(cell) for cell in (c.header, *c.cells)] for c in table.columns]
    least = [max(len(word) for cell in column for word in cell.split()) for column in cells]
    spare = terminal.width - 2 * len(cells) - sum(least)  # two characters around each column
    if spare >= 0:
        for column, texts, width in zip(table.columns, cells, least, strict=True):
            more = min(max(map(len, texts)) - width, spare)
            column.width, spare = width + more, spare - more
    terminal.print(table)


class ProgressListener:
    """Shows the progress of one run: a bar in a terminal, one line per epoch elsewhere.

    The bar shows the epoch, the phase (with the share of full-rank layers if forms are mixed), the
    training FLOPs so far relative to full rank, and the remaining time.
    """

    def __init__(self, out: Console, schedule: str, epochs: int, metric: Metric) -> None:
        self._out, self._schedule, self._epochs = out, schedule, epochs
        self._metric = metric
        self._scores = ""
        self._flops = 0.0
        columns = [
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[where]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        self._bar = Bar(*columns, console=out, disable=not out.is_terminal, expand=True)
        self._task = self._bar.add_task(schedule, total=None, where="")

    def __enter__(self) -> ProgressListener:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._out.file.flush()

    def step(self, progress: Progress) -> None:
        """Update the bar."""
        self._flops = progress.relative_flops_so_far
        if self._out.is_terminal:
            where = progress_text(progress, self._epochs)
            self._bar.update(
                self._task, completed=progress.step, total=progress.total_steps, where=where
            )

    def changed(self, epochs_done: float, changes: list[Change]) -> None:
        """Print which forms changed, and the largest relative change of a weight."""
        kinds = Counter((form_name(c.before), form_name(c.after)) for c in changes)
        error = max(change.error for change in changes)
        for (before, after), count in kinds.items():
            self._out.print(
                f"{self._schedule}: epoch {epochs_done:.2f}: {plural(count, 'layer')} "
                f"{before} -> {after}, "
                f"largest relative weight change {error:.1e}"
            )

    def epoch(self, record: EpochRecord) -> None:
        """Print the epoch's scores; in a terminal they stay above the bar."""
        score = score_text(record.test_score, self._metric, 2)
        self._out.print(
            f"{self._schedule}: epoch {record.epoch:.0f}/{self._epochs}  "
            f"loss {record.train_loss:.3f}  test {self._metric.name} {score}  "
            f"FLOPs so far {self._flops:.3f}x  {seconds_text(record.seconds)}"
        )


def progress_text(progress: Progress, epochs: int) -> str:
    """The progress of a run in one line.

    Example:
        >>> progress_text(Progress(4.25, 17, 40, "mixed", 0.5, 0.71, 0.1), 10)
        'epoch 4.2/10, mixed (50% full-rank), FLOPs 0.71x'
        >>> progress_text(Progress(4.25, 17, 40, "low-rank", 0.0, 0.29, 0.1), 10)
        'epoch 4.2/10, low-rank, FLOPs 0.29x'
    """
    share = f" ({progress.share_full_rank:.0%} full-rank)" if progress.phase == "mixed" else ""
    return (
        f"epoch {progress.epochs_done:.1f}/{epochs}, {progress.phase}{share}, "
        f"FLOPs {progress.relative_flops_so_far:.2f}x"
    )
