"""Files are written whole or not at all: beside their place, synchronized, then renamed.

A reader, and whoever comes after a crash at any line, finds the old file or the new one. What a
dead process left half-written carries its process id, and ``remove_orphans`` removes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from dynarank.files.volume import FULL_DISK, MISSING, missing, sync_file, sync_folder

__all__ = [
    "HOST",
    "alive",
    "make_folder",
    "remove",
    "remove_orphans",
    "replacing",
    "temporary_beside",
    "write_bytes",
    "write_chunks",
    "write_text",
]

HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:60]
_TEMPORARY = re.compile(r"\..*\.(?P<host>[A-Za-z0-9-]*)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_in_use: set[str] = set()  # names of this process's temporary files and folders
_PIECE = 4 << 20  # bytes: hashed while they are in the processor's cache
_DAY = 24 * 3600.0  # seconds; no write takes that long


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A temporary path beside ``path``, which takes its place when the block ends well.

    If the block fails, ``path`` is as it was. The mode of an existing file is kept. A symbolic link
    is followed, as by ``open``: the file it names is replaced, and the link stays.

    Args:
        path: the file to write or replace.

    Raises:
        ValueError: ``path`` is a folder, a device, a pipe or a socket.
        PermissionError: ``path`` is read-only.

    Example:
        >>> path = getfixture("tmp_path") / "a.txt"
        >>> with replacing(path) as beside:
        ...     _ = beside.write_text("all of it")
        >>> path.read_text()
        'all of it'
    """
    target = Path(os.path.realpath(path))
    with _naming(path, target), temporary_beside(target) as beside:
        mode = _mode(target)
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE(beside.stat().st_mode) if mode is None else mode
        yield beside
        os.chmod(beside, mode)
        _sync(beside)
        _rename(beside, target)
    sync_folder(target.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file, or leave the old one.

    Example:
        >>> write_bytes(getfixture("tmp_path") / "a.bin", b"whole")
    """
    with replacing(path) as beside:
        write_chunks(beside, [data], sync=False)  # replacing does


def write_text(path: Path, text: str) -> None:
    r"""Write a whole text file in UTF-8 with ``\n`` line ends, or leave the old one.

    Example:
        >>> write_text(getfixture("tmp_path") / "a.txt", "whole")
    """
    write_bytes(path, text.encode("utf-8"))


def write_chunks(
    path: Path, chunks: Iterable[bytes | memoryview], *, sync: bool = True
) -> tuple[int, str]:
    """Write chunks into a file; return its size in bytes and its SHA-256, taken while writing."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | _CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                written = os.write(descriptor, rest[:_PIECE])
                digest.update(rest[:written])
                size, rest = size + written, rest[written:]
        if sync:
            sync_file(descriptor, path)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


@contextmanager
def temporary_beside(path: Path) -> Generator[Path]:
    """A free name beside ``path``; what is left under it after the block is removed."""
    name = f".{_stem(path.name)}.{HOST}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    beside = path.with_name(name)
    _in_use.add(name)
    try:
        with _naming(path, beside):
            yield beside
    finally:
        remove(beside)
        _in_use.discard(name)


def make_folder(folder: Path, asked: Path | None = None) -> None:
    """Make a folder and those that it lies in, unless they are there.

    Args:
        folder: the folder.
        asked: what is to be written in it, and is named by errors; None: the folder.

    Example:
        >>> make_folder(getfixture("tmp_path") / "a" / "b")
    """
    with _naming(asked or folder, folder, *folder.parents):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _naming(asked: Path, *written: Path) -> Generator[None]:
    """Errors of what is written here name what was asked for, with a note on what to do."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if not isinstance(name, str) or not any(map(Path(name).is_relative_to, (asked, *written))):
            raise
        told = OSError(error.errno, error.strerror, str(asked))
        if error.errno not in FULL_DISK:
            told.add_note("pass another name, in a folder that is there and can be written to")
        raise told from error


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as the volume allows it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_orphans(folder: Path, name: str = "") -> None:
    """Remove the temporary files and folders, of one name or all, of processes that are gone.

    Those of another machine count as orphans after a day.
    """
    for path in folder.iterdir():
        if path.name.startswith(f".{_stem(name)}") and _orphan(path):
            remove(path)


def alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _stem(name: str) -> str:
    """As much of a name as leaves room for the rest in the 255 bytes of a name."""
    return os.fsencode(name)[:120].decode("utf-8", "ignore")


def _orphan(path: Path) -> bool:
    found = _TEMPORARY.fullmatch(path.name)
    if found is None or path.name in _in_use:
        return False
    if found["host"] == HOST:
        pid = int(found["pid"])
        return pid == os.getpid() or not alive(pid)
    try:
        return time.time() - path.lstat().st_mtime > _DAY
    except FileNotFoundError:
        return False


def _mode(target: Path) -> int | None:
    """The permissions of an existing file."""
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise ValueError(f"cannot write {target}: it is {kind}; give the name of a file")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return stat.S_IMODE(mode)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | _CLOEXEC)
    try:
        sync_file(descriptor, path)
    finally:
        os.close(descriptor)


def _rename(beside: Path, target: Path) -> None:
    try:
        os.replace(beside, target)
    except OSError as error:
        if error.errno not in {*MISSING, errno.EXDEV}:
            raise
        missing(target, "rename", "a crash while a file is written leaves a part of it")
        shutil.copyfile(beside, target)
        _sync(target)
