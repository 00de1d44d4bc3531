"""Logging to MLflow: one MLflow run per run, at the configured tracking URI."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from dynarank.records import Record, RunRecord, SummaryRecord
from dynarank.sinks.extras import import_extra
from dynarank.sinks.scalars import event_of, scalars_of

__all__ = ["MlflowSink"]

_BATCH = 1000  # the most metrics that MLflow accepts at once
_FORBIDDEN = re.compile(r"[^\w./ :-]")  # characters that MLflow refuses in a metric's name


class MlflowSink:
    """Logs scalars by optimizer step, and events as the text ``events.txt`` at the end.

    ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` are respected; a run that ends without
    a summary is marked as failed.

    Args:
        folder: the run folder; logged as a tag.
        header: the run record; logged as parameters.

    Raises:
        ImportError: mlflow is not installed.
    """

    def __init__(self, folder: Path, header: RunRecord) -> None:
        mlflow = import_extra("mlflow", "mlflow", "the logging backend")
        entities = import_extra("mlflow.entities", "mlflow", "the logging backend")
        self._client, self._metric = mlflow.MlflowClient(), entities.Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "dynarank"
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        title = f"{header.recipe} {header.schedule} seed {header.seed}"
        run = self._client.create_run(experiment, tags={"folder": str(folder)}, run_name=title)
        self._id: str = run.info.run_id
        data = header.model_dump(exclude={"kind", "metric", "versions"}).items()
        self._client.log_batch(self._id, params=[entities.Param(n, str(v)) for n, v in data])
        self._events: list[str] = []
        self._step, self._whole = 0, False

    def write(self, record: Record, /) -> None:
        """Log one record."""
        self._step = getattr(record, "step", self._step)  # the summary has no step of its own
        self._whole = self._whole or isinstance(record, SummaryRecord)
        now = int(time.time() * 1000)
        metrics = [
            self._metric(_FORBIDDEN.sub("_", name), value, now, self._step)
            for name, value in scalars_of(record).items()
        ]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + _BATCH])
        if event := event_of(record):
            self._events.append(f"step {self._step}: {event[1]}")

    def close(self) -> None:
        """Send the events and end the run."""
        if self._events:
            self._client.log_text(self._id, "\n".join(self._events) + "\n", "events.txt")
        self._client.set_terminated(self._id, "FINISHED" if self._whole else "FAILED")
