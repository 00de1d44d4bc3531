"""The checkpoints of a run: one folder a step, written in the background, the newest verified used.

A failed save never ends the run: what was kept stays, a warning says so, and the next save tries
again.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from dynarank.checkpoint.folder import (
    Contents,
    discard,
    read_folder,
    settle,
    verify_folder,
    write_folder,
)
from dynarank.checkpoint.manifest import NewerFormatError
from dynarank.files.atomic import remove_orphans
from dynarank.files.ownership import rename_free
from dynarank.files.reading import DamagedFileError

__all__ = ["Checkpoints", "is_step"]

_STEP = re.compile(r"step-(\d{8,})", re.ASCII)
_PREVIOUS = re.compile(r"\.(step-\d{8,})\.previous", re.ASCII)
_DAMAGED = re.compile(r"step-\d{8,}\.damaged(-\d+)?", re.ASCII)


def is_step(name: str) -> bool:
    """Whether this is the name of a checkpoint of a run."""
    return _STEP.fullmatch(name) is not None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


class Checkpoints:
    """The checkpoints in a folder, ``step-00001200`` and so on, of which the newest are kept.

    One process at a time works with them: own the run's folder (``dynarank.files.ownership``).

    Args:
        folder: where they lie; it is made if it is not there.
        keep: how many verified ones are kept, at least 2: the newest may be damaged tomorrow.
        background: write in a thread, while training goes on.
        warn: called with each warning, from that thread too.

    Raises:
        ValueError: ``keep`` is less than 2.

    Example:
        >>> checkpoints = Checkpoints(getfixture("tmp_path"))
        >>> checkpoints.save(100, Contents(data={"state": {"epoch": 1}}))
        >>> checkpoints.newest()
        (100, Contents(tensors={}, data={'state': {'epoch': 1}}))
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        background: bool = True,
        warn: Callable[[str], None] = _warn,
    ) -> None:
        if keep < 2:
            raise ValueError(
                f"keep={keep} checkpoints: keep at least 2, so that one is left if the other is"
                " damaged"
            )
        self.folder, self.keep = Path(os.path.abspath(folder)), keep
        self.last_acknowledged: int | None = None  # the last step that is whole on the device
        self._background, self._warn = background, warn
        self._writer: threading.Thread | None = None
        self._failures = 0
        self._error: BaseException | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()

    def save(self, step: int, contents: Contents, *, wait: bool = False) -> None:
        """Write a checkpoint; in the background, unless ``wait`` or ``background=False``.

        One is written at a time: if the last one is not finished, this call waits for it. On a full
        or failing volume a warning says so, and what was kept stays.

        Args:
            step: the step of the run.
            contents: what to write. They are read later: they must not change.
            wait: return when it is on the device, or has failed.

        Raises:
            Exception: what a save before this one could not write, other than by the volume.
        """
        self.drain()
        if wait or not self._background:
            self._write(step, contents)
            return self.drain()
        # Not a daemon: the interpreter waits for it at exit.
        self._writer = threading.Thread(target=self._write, args=(step, contents))
        self._writer.start()

    def newest(self) -> tuple[int, Contents] | None:
        """The newest checkpoint that is as it was written; None if none was ever written.

        Damaged ones are renamed to ``step-….damaged``, with a warning.

        Raises:
            DamagedFileError: all of them are damaged.
            NewerFormatError: a newer version wrote the newest.
        """
        self.drain()
        for step in sorted(self._steps(), reverse=True):
            try:
                return step, self._read(step)
            except DamagedFileError as error:
                self._set_aside(step, error)
        damaged = [name for name in sorted(os.listdir(self.folder)) if _DAMAGED.fullmatch(name)]
        if damaged:
            raise DamagedFileError(
                self.folder,
                f"every checkpoint is damaged ({', '.join(damaged)})",
                "to start over, use another folder",
            )
        return None

    def drain(self) -> None:
        """Wait until what was saved is on the device, or has failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait until what was saved is on the device; the same as ``drain``."""
        self.drain()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        found = map(_STEP.fullmatch, os.listdir(self.folder))
        return [int(match[1]) for match in found if match]

    def _read(self, step: int) -> Contents:
        if self._path(step).is_symlink():
            raise DamagedFileError(self._path(step), "it is a symbolic link")
        return read_folder(self._path(step), step=step)

    def _write(self, step: int, contents: Contents) -> None:
        try:
            path = self._path(step)
            if path.is_symlink() or path.is_file():
                self._set_aside(step, DamagedFileError(path, "it is not a folder"))
            write_folder(path, contents, step=step)
            self._prune(step)
        except (OSError, MemoryError) as error:
            self._report(step, error)
        except BaseException as error:  # raised by the next call
            self._error = error

    def _report(self, step: int, error: OSError | MemoryError) -> None:
        """Warn of the first failure in a row, the second, the fourth and so on."""
        self._failures += 1
        if self._failures & (self._failures - 1):
            return
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.errno is not None:
            reason = f"{errno.errorcode.get(error.errno, error.errno)}, {error.strerror}"
        kept = self._steps()
        safe = f"{self._path(max(kept))} is kept" if kept else "no checkpoint is there yet"
        self._warn(
            f"the checkpoint of step {step:,} was not written ({reason}); {safe}, training goes"
            " on, and the next save tries again"
        )

    def _prune(self, saved: int) -> None:
        """Verify the one just saved, and older ones until enough are kept; remove the rest."""
        verified = 0
        for step in sorted((s for s in self._steps() if s <= saved), reverse=True):
            if verified >= self.keep:
                self._remove(step)
                continue
            try:
                verify_folder(self._path(step), step=step)
            except DamagedFileError as error:
                self._set_aside(step, error)
                continue
            except NewerFormatError:  # not ours to judge
                continue
            verified += 1
            if step == saved:
                self._failures, self.last_acknowledged = 0, saved

    def _remove(self, step: int) -> None:
        try:
            discard(self._path(step))
        except OSError as error:
            self._warn(f"{self._path(step)} is no longer needed and cannot be removed: {error}")

    def _set_aside(self, step: int, error: DamagedFileError) -> None:
        path = self._path(step)
        try:
            where = f"it is now {rename_free(path, f'{path.name}.damaged').name}"
        except OSError as failure:
            where = f"it could not be renamed ({failure})"
        self._warn(f"the checkpoint of step {step:,} is damaged and not used: {error}; {where}")

    def _clean(self) -> None:
        """Finish what a process that is gone had begun."""
        remove_orphans(self.folder)
        for name in os.listdir(self.folder):
            if cut := _PREVIOUS.fullmatch(name):
                settle(self.folder / cut[1])
