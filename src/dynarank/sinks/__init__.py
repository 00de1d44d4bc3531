"""Logging backends: where records go in addition to the run's ``records.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dynarank.files.nearest import did_you_mean
from dynarank.records import RunRecord
from dynarank.sinks.base import FailSafeSink, LazySink, Sink
from dynarank.sinks.extras import import_extra
from dynarank.sinks.mlflow import MlflowSink
from dynarank.sinks.tensorboard import TensorBoardSink
from dynarank.sinks.wandb import WandbSink

__all__ = ["BACKENDS", "Sink", "open_sinks"]

BACKENDS: dict[str, Callable[[Path, RunRecord], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}


def open_sinks(names: Sequence[str], folder: Path) -> list[Sink]:
    """Make a sink for each logging backend; it opens when the run record is written.

    Whether a backend is installed is checked now. A failure later, on opening or writing, does not
    stop the run: there is one warning, and that backend gets no more records.

    Args:
        names: names from :data:`BACKENDS`, each at most once.
        folder: the run folder.

    Raises:
        ValueError: an unknown or repeated name.
        ImportError: a backend that is not installed; the message names the extra.

    Example:
        >>> open_sinks([], Path("runs/one"))
        []
    """
    if len(set(names)) < len(names):
        raise ValueError(f"a logging backend is named twice: {', '.join(names)}")
    for name in names:
        if name not in BACKENDS:
            known, hint = ", ".join(BACKENDS), did_you_mean(name, BACKENDS)
            raise ValueError(f"unknown logging backend {name!r}; known: {known}{hint}")
        import_extra(name, name, f"the logging backend {name!r}")
    return [FailSafeSink(LazySink(BACKENDS[name], folder), name) for name in names]
