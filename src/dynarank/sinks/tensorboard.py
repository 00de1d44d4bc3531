"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

from pathlib import Path

from dynarank.records import Record, RunRecord
from dynarank.sinks.base import import_host
from dynarank.sinks.scalars import event_of, scalars_of

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """Writes figures as scalars and events as text, by optimizer step, under ``tensorboard/``.

    Args:
        folder: the run's.
        header: what is run.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, header: RunRecord) -> None:
        host = import_host("tensorboard", "torch.utils.tensorboard")
        self._writer = host.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("run", f"```\n{header.model_dump_json(indent=2)}\n```")
        self._step = 0

    def write(self, record: Record, /) -> None:
        """Take in one record."""
        self._step = getattr(record, "step", self._step)  # the summary has none: the last
        for name, value in scalars_of(record).items():
            self._writer.add_scalar(name, value, self._step)
        if event := event_of(record):
            self._writer.add_text(*event, self._step)

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()
