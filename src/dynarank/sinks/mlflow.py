"""MLflow: one of its runs for each of ours, where its tracking URI points."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from dynarank.records import Record, RunRecord, SummaryRecord
from dynarank.sinks.base import import_host
from dynarank.sinks.scalars import event_of, scalars_of

__all__ = ["MlflowSink"]

_BATCH = 1000  # the most that MLflow takes at once
_BARRED = re.compile(r"[^\w./ :-]")  # what MLflow refuses in a metric's name


class MlflowSink:
    """Logs figures by optimizer step, and events as the text ``events.txt`` at the end.

    ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` are obeyed; a run that ends without its
    summary is marked as failed.

    Args:
        folder: the run's; a tag there.
        header: what is run; its parameters there.

    Raises:
        ImportError: mlflow is not installed.
    """

    def __init__(self, folder: Path, header: RunRecord) -> None:
        host, entities = import_host("mlflow", "mlflow"), import_host("mlflow", "mlflow.entities")
        self._client, self._metric = host.MlflowClient(), entities.Metric
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
        """Take in one record."""
        self._step = getattr(record, "step", self._step)  # the summary has none: the last
        self._whole = self._whole or isinstance(record, SummaryRecord)
        now = int(time.time() * 1000)
        metrics = [
            self._metric(_BARRED.sub("_", name), value, now, self._step)
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
