"""Interruption of a run: a signal asks it to stop after the current step, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupted", "StopSignals"]

# Ctrl-C, `kill` (and a cluster's end of time), and a terminal that is closed.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(BaseException):
    """Raised when a run has stopped for a signal, after everything was saved.

    It is no ``Exception``, as ``KeyboardInterrupt`` is none: code that goes on after a failed run
    does not go on after this.

    Args:
        signum: the number of the signal.
        folder: the folder of the run; None: no run had begun.
        step: the number of optimizer steps done, and saved; None: they could not be saved.

    Example:
        >>> Interrupted(signal.SIGTERM, Path("runs/a"), 12).exit_code
        143
    """

    def __init__(self, signum: int, folder: Path | None = None, step: int | None = 0) -> None:
        self.signum, self.folder, self.step = int(signum), folder, step
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step} of {folder}")

    @property
    def exit_code(self) -> int:
        """The exit code of a program that a signal has ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class StopSignals:
    """Within its context, the first signal to stop is noted; a second one ends the process at once.

    Args:
        silent: print nothing.

    The signals are SIGINT, SIGTERM and SIGHUP. One that is ignored stays ignored (``nohup``). The
    former handlers are restored at the end. Outside the main thread, where Python allows no
    handlers, nothing is changed.

    Example:
        >>> with StopSignals() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.requested() == signal.SIGTERM
        True
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._requested: int | None = None
        self._former: dict[int, Any] = {}

    def requested(self) -> int | None:
        """The number of the signal that asked to stop; None: there was none."""
        return self._requested

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal asked to stop."""
        if self._requested is not None:
            raise Interrupted(self._requested)

    def __enter__(self) -> Self:
        """Take the signals."""
        if threading.current_thread() is threading.main_thread():
            for signum in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._former[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for signum, handler in self._former.items():
            signal.signal(signum, handler)
        self._former = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._requested is None:
            self._requested = signum
            self._tell("Stopping after this step; a second signal stops at once.")
            return
        self._tell("Stopped at once.")
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)  # the parent sees a process that was ended by this signal

    def _tell(self, text: str) -> None:
        """Write a line to stderr; unlike ``print``, in a signal handler too."""
        with suppress(OSError):
            if not self._silent:
                os.write(2, f"\n{text}\n".encode())
