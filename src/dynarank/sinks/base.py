"""A sink: where a run's records go. Two methods; the rest of the package is adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from dynarank.records import Record, RunRecord

__all__ = ["Opening", "Sink", "Sparing", "import_host"]


class Sink(Protocol):
    """Takes the records of a run, in order. :class:`dynarank.records.RecordWriter` is one."""

    def write(self, record: Record, /) -> None:
        """Take in one record."""
        ...

    def close(self) -> None:
        """Finish; nothing is written afterwards."""
        ...


class Sparing:
    """Spares the run its sink's failures: it warns at the first and writes nothing more there.

    Args:
        sink: the sink.
        name: what to call it in the warning.

    Example:
        >>> class Full:
        ...     def write(self, record): raise OSError("no space left")
        ...     def close(self): pass
        >>> import warnings
        >>> from dynarank.records import NoiseRecord
        >>> sink = Sparing(Full(), "disk")
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     for step in range(3):
        ...         sink.write(NoiseRecord(epoch=0.0, step=step, noise_scale=1.0))
        >>> len(caught)
        1
    """

    def __init__(self, sink: Sink, name: str) -> None:
        self._sink, self._name, self._failed = sink, name, False

    def write(self, record: Record, /) -> None:
        """Take in one record, unless the sink has failed before."""
        if self._failed:
            return
        try:
            self._sink.write(record)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """Close the sink, even one that has failed."""
        try:
            self._sink.close()
        except Exception as error:
            if not self._failed:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        warnings.warn(
            f"the log {self._name!r} failed and gets nothing more; the run goes on, and "
            f"records.jsonl has everything: {error}",
            RuntimeWarning,
            stacklevel=3,
        )


class Opening:
    """Opens a host when the run's header, its first record, comes: the run is named by it there.

    Args:
        host: opens the sink of a run.
        folder: the run's.

    Example:
        >>> Opening(lambda folder, header: None, Path("run")).close()
    """

    def __init__(self, host: Callable[[Path, RunRecord], Sink], folder: Path) -> None:
        self._host, self._folder = host, folder
        self._sink: Sink | None = None

    def write(self, record: Record, /) -> None:
        """Open the sink by the header; hand on what comes after."""
        if isinstance(record, RunRecord):
            self._sink = self._host(self._folder, record)
        elif self._sink is not None:
            self._sink.write(record)

    def close(self) -> None:
        """Close the sink if it was opened."""
        if self._sink is not None:
            self._sink.close()


def import_host(name: str, module: str) -> Any:
    """A host's module, imported only now.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the log {name!r} needs {name}: pip install 'dynarank[{name}]'"
        ) from error
