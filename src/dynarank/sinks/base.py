"""A sink: where a run's records go. Two methods; the rest of the package is adapters."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any, Protocol

from dynarank.records import Record

__all__ = ["Sink", "SinkError", "Sinks", "Sparing", "import_host"]


class SinkError(ValueError):
    """A sink cannot be opened."""


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


class Sinks:
    """Several sinks as one.

    Example:
        >>> Sinks([]).close()
    """

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, record: Record, /) -> None:
        """Write to each."""
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Close each."""
        for sink in self._sinks:
            sink.close()


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
