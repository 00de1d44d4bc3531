"""Logging to TensorBoard: event files in the run folder."""

from __future__ import annotations

from pathlib import Path

from dynarank.records import Record, RunRecord
from dynarank.sinks.extras import import_extra
from dynarank.sinks.scalars import event_of, scalars_of

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """Logs scalars and text events by optimizer step, under ``tensorboard/`` in the run folder.

    Args:
        folder: the run folder.
        header: the run record.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, header: RunRecord) -> None:
        tensorboard = import_extra("torch.utils.tensorboard", "tensorboard", "the logging backend")
        self._writer = tensorboard.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("run", f"```\n{header.model_dump_json(indent=2)}\n```")
        self._step = 0

    def write(self, record: Record, /) -> None:
        """Log one record."""
        self._step = getattr(record, "step", self._step)  # the summary has no step of its own
        for name, value in scalars_of(record).items():
            self._writer.add_scalar(name, value, self._step)
        if event := event_of(record):
            self._writer.add_text(*event, self._step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
