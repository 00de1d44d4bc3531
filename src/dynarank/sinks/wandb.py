"""Logging to Weights & Biases: one W&B run per run; mode and account come from its own settings."""

from __future__ import annotations

import os
from pathlib import Path

from dynarank.records import Record, RunRecord, SummaryRecord
from dynarank.sinks.extras import import_extra
from dynarank.sinks.scalars import event_of, scalars_of

__all__ = ["WandbSink"]


class WandbSink:
    """Logs scalars by optimizer step, and events as a table at the end.

    ``WANDB_MODE``, ``WANDB_PROJECT`` and the like are respected; a run that ends without a summary
    is marked as failed.

    Args:
        folder: the run folder.
        header: the run record; logged as the configuration.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, folder: Path, header: RunRecord) -> None:
        self._host = import_extra("wandb", "wandb", "the logging backend")
        self._run = self._host.init(
            project=None if _project_is_set() else "dynarank",
            name=f"{header.recipe} {header.schedule} seed {header.seed}",
            group=header.recipe,
            dir=str(folder),
            config=header.model_dump(),
            reinit="create_new",
            settings=self._host.Settings(console="off"),
        )
        self._events: list[list[object]] = []
        self._step, self._whole = 0, False

    def write(self, record: Record, /) -> None:
        """Log one record."""
        self._step = getattr(record, "step", self._step)  # the summary has no step of its own
        self._whole = self._whole or isinstance(record, SummaryRecord)
        if scalars := scalars_of(record):
            self._run.log(scalars, step=self._step)
        if event := event_of(record):
            self._events.append([self._step, *event])

    def close(self) -> None:
        """Send the events and finish the run."""
        if self._events:
            table = self._host.Table(columns=["step", "kind", "event"], data=self._events)
            self._run.log({"events": table}, step=self._step)
        self._run.finish(exit_code=0 if self._whole else 1)


def _project_is_set() -> bool:
    return bool(os.environ.get("WANDB_PROJECT"))
