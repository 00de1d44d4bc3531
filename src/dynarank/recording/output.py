"""Where the records of a run go: to its folder and to logging backends. No failure ends a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from dynarank.records import Record, RecordWriter, RunRecord, read_run
from dynarank.sinks import Sink

__all__ = ["Output", "Silence"]


class Output:
    """Writes records to a folder's ``records.jsonl`` and to sinks.

    What does not fit on a full disk is kept in memory until it does. Sinks get the header once the
    length of an epoch is known, and with it all records so far.

    Args:
        folder: the folder of the run.
        sinks: logging backends.
    """

    def __init__(self, folder: Path, sinks: Sequence[Sink]) -> None:
        self.folder, self._sinks = folder, sinks
        self._writer = RecordWriter(folder)
        self._unwritten: list[Record] = []
        # From the sinks, while their header is not final.
        self._held: list[Record] | None = [] if sinks else None

    def begin(self, records: Sequence[Record], *, final: bool) -> None:
        """Begin with these records, a header first; ``final``: its epochs are known."""
        self._writer.rewrite(records)
        self._held = list(records) if self._sinks else None
        if final:
            self._release()

    def write(self, record: Record) -> None:
        """Write one record."""
        told = bool(self._unwritten)
        self._unwritten.append(record)
        self._catch_up(silent=told)
        if self._held is not None:
            self._held.append(record)
        else:
            for sink in self._sinks:
                sink.write(record)

    def relabel(self, change: Callable[[Record], Record]) -> None:
        """Rewrite every record, as when the length of an epoch becomes known."""
        if not self._catch_up(silent=True):
            return
        self._writer.rewrite(map(change, read_run(self.folder).records))
        if self._held is not None:
            self._held = list(map(change, self._held))
            self._release()

    def sync(self) -> None:
        """Have the records on the device."""
        if self._catch_up(silent=True):
            self._writer.position()

    def close(self) -> None:
        """Close the file and the sinks."""
        self._catch_up(silent=False)
        self._release()
        self._writer.close()
        for sink in self._sinks:
            sink.close()

    def _release(self) -> None:
        held, self._held = self._held or [], None
        for record in held if held and isinstance(held[0], RunRecord) else ():
            for sink in self._sinks:
                sink.write(record)

    def _catch_up(self, *, silent: bool) -> bool:
        """Write what could not be written before; whether there is nothing left."""
        try:
            while self._unwritten:
                self._writer.write(self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            if not silent:
                warnings.warn(
                    f"{self.folder}/records.jsonl cannot be written ({error.strerror or error}); "
                    "the records are kept in memory until it can",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return not self._unwritten


class Silence(Output):
    """The output of all processes but the first: nothing is written."""

    def __init__(self) -> None: ...

    def begin(self, records: Sequence[Record], *, final: bool) -> None:
        """Write nothing."""

    def write(self, record: Record) -> None:
        """Write nothing."""

    def relabel(self, change: Callable[[Record], Record]) -> None:
        """Write nothing."""

    def sync(self) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Write nothing."""
