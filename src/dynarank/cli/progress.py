"""The live progress of a run in the terminal."""

from __future__ import annotations

from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from dynarank.forms import Change, form_name
from dynarank.records import EpochRecord, Metric
from dynarank.report.formats import plural, score_text, seconds_text
from dynarank.train.listener import Progress

__all__ = ["ProgressListener", "progress_text"]


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
