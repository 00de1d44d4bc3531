"""How figures look in the terminal, and the live progress of a run."""

from __future__ import annotations

import sys
from collections import Counter
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from dynarank.forms import Change, form_name
from dynarank.records import EpochRecord, Metric
from dynarank.report.formats import number, percent, seconds_text
from dynarank.train.listener import Progress

__all__ = ["ProgressListener", "console", "right_aligned", "score_text"]


def console(*, quiet_stdout: bool = False) -> Console:
    """A console on stdout, or on stderr where stdout is for JSON; 120 columns if not a terminal."""
    out = Console(stderr=quiet_stdout, highlight=False)
    return out if out.is_terminal else Console(stderr=quiet_stdout, highlight=False, width=120)


def right_aligned(title: str, first: list[str], numbers: list[str]) -> Table:
    """A table whose first columns are words and whose others are figures."""
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
        table.add_column(name, justify="right")
    return table


def score_text(metric: Metric, score: float) -> str:
    """A score as its metric is shown.

    Example:
        >>> score_text(Metric(), 0.9675), score_text(Metric(name="perplexity", percent=False), 31.41)
        ('96.75%', '31.41')
    """  # noqa: E501
    return percent(score, 2) if metric.percent else number(score)


class ProgressListener:
    """Shows one run: a bar in a terminal, a line an epoch elsewhere."""

    def __init__(self, out: Console, schedule: str, epochs: int, metric: Metric) -> None:
        self._out, self._schedule, self._epochs = out, schedule, epochs
        self._metric = metric
        self._form, self._scores = "", ""
        columns = [
            TextColumn("[bold]{task.description:<16}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        self._progress = Bar(*columns, console=out, disable=not out.is_terminal)
        self._task = self._progress.add_task(schedule, total=epochs, note="")

    def __enter__(self) -> ProgressListener:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        sys.stdout.flush()

    def step(self, progress: Progress) -> None:
        """Move the bar."""
        done = round(progress.epochs_done, 2)
        self._progress.update(self._task, completed=done, note=self._note())

    def changed(self, epochs_done: float, changes: list[Change]) -> None:
        """Say which forms changed, and by how much the weights did."""
        kinds = Counter((form_name(c.before), form_name(c.after)) for c in changes)
        error = max(change.error for change in changes)
        for (before, after), count in kinds.items():
            self._form = after
            self._out.print(
                f"{self._schedule}: epoch {epochs_done:.2f}: {count} layers {before} -> {after}, "
                f"largest relative change of a weight {error:.1e}"
            )

    def epoch(self, record: EpochRecord) -> None:
        """The epoch's scores."""
        score = score_text(self._metric, record.test_score)
        self._scores = f"loss {record.train_loss:.3f}  test {self._metric.name} {score}"
        self._progress.update(self._task, note=self._note())
        if not self._out.is_terminal:
            self._out.print(
                f"{self._schedule}: epoch {record.epoch:.0f}/{self._epochs}  {self._scores}  "
                f"FLOPs {record.relative_flops:.3f}x  {seconds_text(record.seconds)}"
            )

    def _note(self) -> str:
        return f"{self._form}  {self._scores}".strip()
