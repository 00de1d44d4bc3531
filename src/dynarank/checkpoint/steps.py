"""The checkpoints of a run: one folder a step, written in the background, the newest verified used.

A failed save never ends the run: what was kept stays, a warning says so, and the next save tries
again. Of several processes the first lists, removes and renames; what one finds damaged is damaged
for all.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dynarank.checkpoint.findings import in_all
from dynarank.checkpoint.folder import (
    Contents,
    discard,
    read_folder,
    settle,
    verify_folder,
)
from dynarank.checkpoint.manifest import NewerFormatError
from dynarank.checkpoint.together import write_together
from dynarank.distributed.processes import (
    DisagreementError,
    PeerError,
    Processes,
    processes_of,
)
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

    One run at a time works with them: own its folder (``dynarank.files.ownership``). Of several
    processes that train together, all make one and make the same calls.

    Args:
        folder: where they lie; it is made if it is not there.
        keep: how many verified ones are kept, at least 2: the newest may be damaged tomorrow.
        background: write in a thread, while training goes on.
        warn: called with each warning, from that thread too; of several processes, in the first.
        processes: those that write and read them together; None: all of the process group, if one
            is initialized.

    Raises:
        ValueError: ``keep`` is less than 2.
        DisagreementError: processes differ in the folder.

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
        processes: Processes | None = None,
    ) -> None:
        if keep < 2:
            raise ValueError(
                f"keep={keep} checkpoints: keep at least 2, so that one is left if the other is"
                " damaged"
            )
        self.folder, self.keep = Path(os.path.abspath(folder)), keep
        self.last_acknowledged: int | None = None  # the last step that is whole on the device
        # Its own group: a thread's calls come in another order than those of the training.
        self._processes = (processes_of() if processes is None else processes).beside()
        self._background, self._warn = background, warn
        self._writer: threading.Thread | None = None
        self._failures = 0
        self._error: BaseException | None = None
        self._processes.agree("the folder of checkpoints", str(self.folder))
        self._by_first("cleaning the folder of checkpoints", self._clean)

    def save(self, step: int, contents: Contents, *, wait: bool = False) -> None:
        """Write a checkpoint; in the background, unless ``wait`` or ``background=False``.

        One is written at a time: if the last one is not finished, this call waits for it. On a full
        or failing volume a warning says so, and what was kept stays.

        Args:
            step: the step of the run.
            contents: what to write, of this process. They are read later: they must not change.
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
        if damaged := self._listed(_DAMAGED):
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

    def _by_first(self, what: str, function: Callable[[], object]) -> None:
        """Have the first process do something; where it fails, all do."""
        self._processes.attempt(what, function if self._processes.rank == 0 else lambda: None)

    def _listed(self, names: re.Pattern[str]) -> list[str]:
        """The names in the folder that match, as the first process sees them."""

        def matching() -> list[str]:
            return sorted(filter(names.fullmatch, os.listdir(self.folder)))

        found = matching() if self._processes.rank == 0 else []
        return self._processes.from_first("the list of checkpoints", found)

    def _steps(self) -> list[int]:
        return [int(name.removeprefix("step-")) for name in self._listed(_STEP)]

    def _read(self, step: int) -> Contents:
        self._check_no_link(step)
        return read_folder(self._path(step), step=step, processes=self._processes)

    def _check_no_link(self, step: int) -> None:
        def check() -> None:
            if self._path(step).is_symlink():
                raise DamagedFileError(self._path(step), "it is a symbolic link")

        in_all(self._processes, f"the checkpoint of step {step}", check)

    def _write(self, step: int, contents: Contents) -> None:
        try:
            self._by_first("making room", lambda: self._make_room(step))
            write_together(self._path(step), contents, self._processes, step=step)
            self._prune(step)
        except Exception as error:
            self._failed(step, error)
        except BaseException as error:  # raised by the next call
            self._error = error

    def _make_room(self, step: int) -> None:
        path = self._path(step)
        if path.is_symlink() or path.is_file():
            self._move_aside(step, DamagedFileError(path, "it is not a folder"))

    def _failed(self, step: int, error: Exception) -> None:
        """Say that the volume failed, in one process or all; other errors are raised later."""
        reason = None if isinstance(error, PeerError) else _reason(error)
        try:
            reasons = self._processes.gather("why the checkpoint was not written", reason)
        except (PeerError, DisagreementError):
            reasons = [""]
        told = [one for one in reasons if one is not None]
        if told and all(told):
            self._report(step, told[0])
        else:
            self._error = error

    def _report(self, step: int, reason: str) -> None:
        """Warn of the first failure in a row, the second, the fourth and so on."""
        self._failures += 1
        if self._failures & (self._failures - 1):
            return
        kept = self._steps()
        safe = f"{self._path(max(kept))} is kept" if kept else "no checkpoint is there yet"
        self._say(
            f"the checkpoint of step {step:,} was not written ({reason}); {safe}, training goes"
            " on, and the next save tries again"
        )

    def _say(self, message: str) -> None:
        if self._processes.rank == 0:
            self._warn(message)

    def _prune(self, saved: int) -> None:
        """Verify the one just saved, and older ones until enough are kept; remove the rest."""
        verified = 0
        for step in sorted((s for s in self._steps() if s <= saved), reverse=True):
            if verified >= self.keep:
                self._by_first("removing a checkpoint", partial(self._remove, step))
                continue
            try:
                self._verify(step)
            except DamagedFileError as error:
                self._set_aside(step, error)
                continue
            except NewerFormatError:  # not ours to judge
                continue
            verified += 1
            if step == saved:
                self._failures, self.last_acknowledged = 0, saved

    def _verify(self, step: int) -> None:
        path, processes = self._path(step), self._processes
        what = f"verifying the checkpoint of step {step}"
        in_all(processes, what, lambda: verify_folder(path, step=step, processes=processes))

    def _remove(self, step: int) -> None:
        try:
            discard(self._path(step))
        except OSError as error:
            self._warn(f"{self._path(step)} is no longer needed and cannot be removed: {error}")

    def _set_aside(self, step: int, error: DamagedFileError) -> None:
        self._by_first("moving a checkpoint aside", lambda: self._move_aside(step, error))

    def _move_aside(self, step: int, error: DamagedFileError) -> None:
        path = self._path(step)
        try:
            where = f"it is now {rename_free(path, f'{path.name}.damaged').name}"
        except OSError as failure:
            where = f"it could not be renamed ({failure})"
        self._warn(f"the checkpoint of step {step:,} is damaged and not used: {error}; {where}")

    def _clean(self) -> None:
        """Finish what a process that is gone had begun."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_orphans(self.folder)
        for name in os.listdir(self.folder):
            if cut := _PREVIOUS.fullmatch(name):
                settle(self.folder / cut[1])


def _reason(error: Exception) -> str:
    """Why the volume, or the memory, failed; "" for another error."""
    if not isinstance(error, OSError | MemoryError):
        return ""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{errno.errorcode.get(error.errno, error.errno)}, {error.strerror}"
    return str(error) or type(error).__name__
