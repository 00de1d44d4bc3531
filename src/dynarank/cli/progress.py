"""The live progress of a run in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from dynarank.forms import Change, Form, FullRank, form_name
from dynarank.records import EpochRecord, Metric
from dynarank.report.formats import plural, range_text, score_text, seconds_text
from dynarank.train.listener import Progress

__all__ = ["ProgressListener", "changes_text", "progress_text", "that_fit"]


class ProgressListener:
    """Shows the progress of one run: a line per epoch and, in a terminal, a bar below them.

    The bar shows the epoch, the phase (with the share of full-rank layers if forms are mixed) and
    the remaining time.

    Args:
        out: the console.
        name: what the run is called.
        epochs: the length of the run.
        metric: the metric of its scores.
        changes: also print which forms changed in an epoch.
    """

    def __init__(
        self, out: Console, name: str, epochs: int, metric: Metric, *, changes: bool = True
    ) -> None:
        self._out, self._name, self._epochs, self._metric = out, name, epochs, metric
        self._flops = 0.0
        self._changes: list[tuple[float, Change]] | None = [] if changes else None
        columns = [
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[where]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        self._bar = Bar(
            *columns, console=out, disable=not out.is_terminal, expand=True, transient=True
        )
        self._task = self._bar.add_task(name, total=None, where="")

    def __enter__(self) -> ProgressListener:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._show_changes()
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
        """Note which forms changed; they are printed with the epoch."""
        if self._changes is not None:
            self._changes += [(epochs_done, change) for change in changes]

    def epoch(self, record: EpochRecord) -> None:
        """Print the epoch's scores; in a terminal they stay above the bar."""
        self._show_changes()
        parts = [f"{self._name}: epoch {record.epoch:.0f}/{self._epochs}"]
        if record.test_score is not None:
            score = score_text(record.test_score, self._metric, 2)
            parts.append(f"test {self._metric.name} {score}")
        if record.train_loss is not None:
            parts.append(f"loss {record.train_loss:.3f}")
        parts += [f"FLOPs {self._flops:.3f}x", seconds_text(record.seconds)]
        self._out.print(Text(that_fit(parts, self._out.width)))

    def _show_changes(self) -> None:
        for line in changes_text(self._changes or []):
            self._out.print(Text(f"{self._name}: {line}"))
        if self._changes:
            self._changes.clear()


def progress_text(progress: Progress, epochs: int) -> str:
    """The progress of a run in one line.

    Example:
        >>> progress_text(Progress(4.25, 17, 40, "mixed", 0.5, 0.71, 0.1), 10)
        'epoch 4.2/10, mixed (50% full-rank)'
        >>> progress_text(Progress(4.25, 17, 40, "low-rank", 0.0, 0.29, 0.1), 10)
        'epoch 4.2/10, low-rank'
    """
    share = f" ({progress.share_full_rank:.0%} full-rank)" if progress.phase == "mixed" else ""
    return f"epoch {progress.epochs_done:.1f}/{epochs}, {progress.phase}{share}"


def changes_text(changes: list[tuple[float, Change]]) -> list[str]:
    """A line for each kind of change of an epoch: how many layers, and the largest error.

    Example:
        >>> from dynarank.forms import FullRank, LowRank
        >>> cuts = [(at, Change("0", LowRank(9), LowRank(5), 0.5)) for at in (4.25, 4.5)]
        >>> first = 4.25, Change("1", FullRank(), LowRank(9), 0.25)
        >>> print(*changes_text([first, *cuts]), sep=chr(10))
        epoch 4.25: 1 layer full-rank -> low-rank, error 2.5e-01
        epoch 4.25 to 4.50: 1 layer low-rank 9 -> low-rank 5, error 5.0e-01
    """

    def kind(found: tuple[float, Change]) -> tuple[str, str]:
        return form_name(found[1].before), form_name(found[1].after)

    lines: list[str] = []
    for (before, after), group in groupby(sorted(changes, key=kind), key=kind):
        found = list(group)
        times = dict.fromkeys(f"{time:.2f}" for time in sorted(time for time, _ in found))
        when = " to ".join(dict.fromkeys([next(iter(times)), next(reversed(times))]))
        layers = plural(len({change.path for _, change in found}), "layer")
        error = max(change.error for _, change in found)
        if before == after:  # only the ranks say what has changed
            first = {change.path: change.before for _, change in reversed(found)}
            last = {change.path: change.after for _, change in found}
            before, after = before + _ranks(first.values()), after + _ranks(last.values())
        lines.append(f"epoch {when}: {layers} {before} -> {after}, error {error:.1e}")
    return lines


def _ranks(forms: Iterable[Form]) -> str:
    """The ranks of forms of one name, after a space: `` 9``, `` 5 to 9``; empty if unknown."""
    ranks = [one.rank for one in forms if not isinstance(one, FullRank)]
    text = range_text(rank for rank in ranks if isinstance(rank, int))
    return f" {text}" if text else ""


def that_fit(parts: list[str], width: int) -> str:
    """The first part and as many others as fit into a line.

    Example:
        >>> that_fit(["decay: epoch 1/3", "loss 0.446", "0.3 s"], 30)
        'decay: epoch 1/3  loss 0.446'
    """
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line
