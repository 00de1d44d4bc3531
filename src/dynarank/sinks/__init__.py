"""Where records go beside the run's ``records.jsonl``: hosts that one asks for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from dynarank.records import RunRecord
from dynarank.sinks.base import Opening, Sink, Sparing, import_host
from dynarank.sinks.mlflow import MlflowSink
from dynarank.sinks.tensorboard import TensorBoardSink
from dynarank.sinks.wandb import WandbSink

__all__ = ["HOSTS", "Sink", "open_sinks"]

HOSTS: dict[str, Callable[[Path, RunRecord], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}


def open_sinks(names: Sequence[str], folder: Path) -> list[Sink]:
    """A sink for each host; each opens when the run's header comes as its first record.

    That a host is installed is looked at now. What fails later, opening it too, ends no run: it is
    warned of once, and that host gets nothing more.

    Args:
        names: of :data:`HOSTS`, each at most once.
        folder: the run's.

    Raises:
        ValueError: an unknown or repeated name.
        ImportError: a host that is not installed; the message names the extra.

    Example:
        >>> open_sinks([], Path("runs/one"))
        []
    """
    if len(set(names)) < len(names):
        raise ValueError(f"a log is named twice: {', '.join(names)}")
    for name in names:
        if name not in HOSTS:
            near = difflib.get_close_matches(name, HOSTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown log {name!r}; known: {', '.join(HOSTS)}{hint}")
        import_host(name, name)
    return [Sparing(Opening(HOSTS[name], folder), name) for name in names]
