"""The records of an experiment: a JSON line a run, appended whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.training.harness.record import (
    VERSION,
    Run,
    check,
    finite,
    number_of,
    refuse_constant,
)

ROOT = Path(__file__).parents[1] / "results"


def _whole(content: bytes) -> bytes:
    """The content without a last line that was not finished."""
    whole, last = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(last)
    except ValueError:
        return whole
    return content


class Store:
    """The runs of an experiment, in ``FOLDER/EXPERIMENT.jsonl``.

    Several processes may append at once. A line that a killed process did not finish is left out,
    and cut off by the next that appends.
    """

    def __init__(self, experiment: str, folder: Path = ROOT) -> None:
        self.path = folder / f"{experiment}.jsonl"

    def runs(self, metric: str | None = None) -> list[Run]:
        """All runs, in the order in which they ended.

        Args:
            metric: what is reported of them.

        Raises:
            ValueError: a line is damaged, or of another version.
        """
        if not self.path.exists():
            return []
        lines = _whole(self.path.read_bytes()).splitlines()
        return [self._read(line, number + 1, metric) for number, line in enumerate(lines)]

    def _read(self, line: bytes, number: int, metric: str | None) -> Run:
        place = f"{self.path}, line {number}"
        try:
            run = json.loads(line, parse_constant=refuse_constant, parse_float=number_of)
            version = run["version"]
            if version == VERSION:
                check(run, self.path.stem, metric)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            fix = "take that line out, and `run` does the run again"
            raise ValueError(f"{place}, is no record of a run ({error!r}); {fix}") from error
        if version != VERSION:
            raise ValueError(f"{place}: a record of version {version}, this code reads {VERSION}")
        return run

    def append(self, run: Run) -> None:
        """Add a run; what is not finite in it, of one that diverged, is null."""
        whole_run = finite({"version": VERSION, **run})
        line = json.dumps(whole_run, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._locked() as file:
            content = _whole(file.read())
            file.truncate(len(content))
            file.seek(0, os.SEEK_END)
            line = b"\n" + line if content and not content.endswith(b"\n") else line
            whole = os.fstat(file.fileno()).st_size
            if file.write(line) < len(line):  # the disk is full
                file.truncate(whole)
                raise OSError(errno.ENOSPC, "a record could not be written", str(self.path))
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file
