"""Files are read with care: regular files only, of a bounded size, and damage has a name."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynarank.files.printable import printable

__all__ = ["DamagedFileError", "read_bytes", "reading", "sha256"]

_CHUNK = 1 << 20
# Too many open files, no memory: of the process, not of the file.
_TRANSIENT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})


class DamagedFileError(ValueError):
    """A file that is there but cannot be read as what it should be.

    Example:
        >>> str(DamagedFileError("config.json", "it is not JSON"))
        'config.json cannot be read: it is not JSON'
        >>> str(DamagedFileError("config.json", "it is not JSON", "restore it from a copy"))
        'config.json cannot be read: it is not JSON; restore it from a copy'
    """

    def __init__(self, name: str | Path, problem: str, way_out: str = "") -> None:
        text = f"{printable(str(name), 500)} cannot be read: {problem}"
        super().__init__(f"{text}; {way_out}" if way_out else text)
        self.name, self.problem, self.way_out = str(name), problem, way_out

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.problem, self.way_out)  # to another process


@contextmanager
def reading(path: Path) -> Generator[int]:
    """The descriptor of a regular file, opened for reading.

    A symbolic link may lead to another file of the same folder, not out of it. Pipes and devices
    are not opened.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not a regular file, or the volume cannot read it.
    """
    try:
        descriptor = _open(path)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DamagedFileError(path, "it is not a regular file")
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _TRANSIENT:
            raise
        raise DamagedFileError(path, os.strerror(error.errno or 0)) from error


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file of at most ``max_bytes``.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is larger, or not a regular file, or the volume cannot read it.

    Example:
        >>> path = getfixture("tmp_path") / "a.bin"
        >>> _ = path.write_bytes(b"whole")
        >>> read_bytes(path, 5)
        b'whole'
    """
    with reading(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise DamagedFileError(path, f"it has {size:,} bytes, at most {max_bytes:,} are read")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise DamagedFileError(path, f"it grows beyond {max_bytes:,} bytes while it is read")
    return data


def sha256(path: Path) -> str:
    """The SHA-256 of a regular file, as hex digits."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with reading(path) as descriptor, os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _open(path: Path) -> int:
    if path.is_symlink():
        target = os.path.realpath(path)
        if not Path(target).is_relative_to(os.path.realpath(path.parent)):
            raise DamagedFileError(path, f"it is a symbolic link out of its folder, to {target}")
    # Non-blocking: to open a pipe does not wait for its writer.
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
