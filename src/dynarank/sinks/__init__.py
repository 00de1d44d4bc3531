"""Where records go: the run's ``records.jsonl`` always, and hosts that one asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dynarank.records import RecordWriter, RunRecord
from dynarank.sinks.base import Sink, SinkError, Sinks, Sparing
from dynarank.sinks.mlflow import MlflowSink
from dynarank.sinks.tensorboard import TensorBoardSink
from dynarank.sinks.wandb import WandbSink

__all__ = ["HOSTS", "Sink", "SinkError", "Sinks", "Sparing", "open_sinks"]

HOSTS: dict[str, Callable[[Path, RunRecord], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}


def open_sinks(names: Sequence[str], folder: Path, header: RunRecord) -> list[Sink]:
    """The run's record file, and a sink for each host; the header is the caller's first record.

    A host that fails while the run is under way is warned of once and left out from then on; one
    that cannot be opened is an error, for nothing has been computed yet.

    Args:
        names: of :data:`HOSTS`, each at most once.
        folder: the run's.
        header: what is run.

    Raises:
        ValueError: an unknown or repeated name, or a host that cannot be opened.
        ImportError: a host that is not installed; the message names the extra.
    """
    if unknown := [name for name in names if name not in HOSTS]:
        raise ValueError(f"unknown log {unknown[0]!r}; known: {', '.join(HOSTS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"a log is named twice: {', '.join(names)}")
    opened: list[Sink] = []
    try:
        for name in names:
            opened.append(Sparing(_open(name, folder, header), name))
        return [RecordWriter(folder), *opened]
    except Exception:
        for sink in opened:
            sink.close()
        raise


def _open(name: str, folder: Path, header: RunRecord) -> Sink:
    try:
        return HOSTS[name](folder, header)
    except ImportError:
        raise
    except Exception as error:
        raise SinkError(f"the log {name!r} cannot be opened: {error}") from error
