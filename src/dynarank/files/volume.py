"""What a volume promises: data on the device after fsync, renames in one step, file locks.

Object stores and some network mounts lack one or the other. What is missing is said once per volume
(a RuntimeWarning), and the writer goes on with what is left.
"""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

__all__ = ["FULL_DISK", "MISSING", "missing", "sync_file", "sync_folder"]

# What a volume answers if it does not know an operation; everything else is a failure.
MISSING = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
# The fault of the disk, not of what was asked: when there is room, the same succeeds.
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG})
_said: set[tuple[int, str]] = set()


def missing(path: Path, what: str, consequence: str) -> None:
    """Warn, once per volume, that the volume of ``path`` lacks ``what``."""
    device = os.stat(path if path.exists() else path.parent).st_dev
    if (device, what) not in _said:
        _said.add((device, what))
        warnings.warn(f"the volume of {path} has no {what}: {consequence}", stacklevel=2)


def sync_file(descriptor: int, path: Path) -> None:
    """Wait until the data of an open file or folder is on the device."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in MISSING:
            raise
        missing(path, "fsync", "a power cut may undo what was written last")


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the device."""
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        sync_file(descriptor, folder)
    finally:
        os.close(descriptor)
