"""Signals that ask a command to stop, outside of training."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from dynarank.train.interruption import Interrupted

__all__ = ["raising_on_signals"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def raising_on_signals() -> Generator[None]:
    """Within, a signal to stop raises :class:`Interrupted`; a second one exits at once.

    This is for all that has no step to finish: reading data, reports. Training takes the signals
    itself. One that is ignored stays ignored (``nohup``), and outside the main thread nothing
    changes.
    """
    got: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        if got:
            os._exit(128 + signum)
        got.append(signum)
        raise Interrupted(signum)

    before: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
