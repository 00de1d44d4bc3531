"""The interface of logging backends, and what makes them safe to use in a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from dynarank.records import Record, RunRecord

__all__ = ["FailSafeSink", "LazySink", "Sink"]


class Sink(Protocol):
    """Receives the records of a run, in order. :class:`dynarank.records.RecordWriter` is one."""

    def write(self, record: Record, /) -> None:
        """Write one record."""
        ...

    def close(self) -> None:
        """Close the sink; nothing is written afterwards."""
        ...


class FailSafeSink:
    """Wraps a sink so that its failures never stop the run: one warning, then no more writes.

    Args:
        sink: the sink to wrap.
        name: its name in the warning.

    Example:
        >>> class Full:
        ...     def write(self, record): raise OSError("no space left")
        ...     def close(self): pass
        >>> import warnings
        >>> from dynarank.records import NoiseRecord
        >>> sink = FailSafeSink(Full(), "disk")
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
        """Write one record, unless the sink has failed before."""
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
            f"the logging backend {self._name!r} failed and gets no more records; the run "
            f"continues, and records.jsonl has everything: {error}",
            RuntimeWarning,
            stacklevel=3,
        )


class LazySink:
    """Opens a backend when the run record comes, which is the first and names the run.

    Args:
        backend: opens the sink of a run.
        folder: the run folder.

    Example:
        >>> LazySink(lambda folder, header: None, Path("run")).close()
    """

    def __init__(self, backend: Callable[[Path, RunRecord], Sink], folder: Path) -> None:
        self._backend, self._folder = backend, folder
        self._sink: Sink | None = None

    def write(self, record: Record, /) -> None:
        """Open the sink with the run record; pass on all later records."""
        if isinstance(record, RunRecord):
            self._sink = self._backend(self._folder, record)
        elif self._sink is not None:
            self._sink.write(record)

    def close(self) -> None:
        """Close the sink if it was opened."""
        if self._sink is not None:
            self._sink.close()
