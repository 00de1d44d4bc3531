"""A folder has one owner: a lock while a process works in it, new names, moving aside."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from dynarank.files.atomic import HOST, alive, remove_orphans
from dynarank.files.json_data import DamagedFileError, dump_json, read_json
from dynarank.files.printable import printable
from dynarank.files.volume import MISSING, missing

__all__ = ["FolderInUseError", "move_aside", "new_folder", "owned", "rename_free"]

_LOCK, _OWNER = ".lock", ".owner"
_NO_LOCKS = frozenset({*MISSING, errno.ENOLCK})
_held: set[int] = set()  # descriptors of locks
_tokens: set[str] = set()  # in this process's files in place of locks


class FolderInUseError(ValueError):
    """A folder in which another process works."""


@contextmanager
def owned(folder: Path) -> Generator[None]:
    """Own a folder: no other process, nor this one a second time, owns it within the block.

    The lock ends with the process, however that ends; forked children do not keep it. On a volume
    without locks a file stands in, which dead processes of the same machine lose. The folder is
    made if it is not there, and what dead processes left half-written in it is removed.

    Raises:
        FolderInUseError: it is owned: by which process, on which machine, since when.

    Example:
        >>> with owned(getfixture("tmp_path")):
        ...     pass
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, owner = folder.resolve() / _LOCK, os.getpid()
    lock = _acquire(path)
    try:
        remove_orphans(folder)
        yield
    finally:
        if os.getpid() == owner:
            _release(path, lock)


def new_folder(parent: Path, stem: str) -> Path:
    """Make a folder that nobody else has: ``stem``, or ``stem-2``, ``stem-3`` and so on.

    Example:
        >>> parent = getfixture("tmp_path")
        >>> [new_folder(parent, "digits").name for _ in range(2)]
        ['digits', 'digits-2']
    """
    parent.mkdir(parents=True, exist_ok=True)
    return _first_free(parent / stem, Path.mkdir)


def move_aside(path: Path) -> Path:
    """Rename a file or folder to ``.aside``, ``.aside-2`` and so on, so that nothing is lost.

    Returns:
        The new path.

    Example:
        >>> path = getfixture("tmp_path") / "digits"
        >>> path.mkdir()
        >>> move_aside(path).name
        'digits.aside'
    """
    path = Path(os.path.abspath(path))
    return rename_free(path, f"{path.name}.aside")


def rename_free(path: Path, name: str) -> Path:
    """Rename a file or folder to ``name``, or to ``name-2`` and so on where that is taken."""
    folder = path.is_dir() and not path.is_symlink()
    free = _first_free(path.with_name(name), Path.mkdir if folder else _make_file)
    try:
        os.replace(path, free)  # over the empty one that kept the name
    except BaseException:
        free.rmdir() if folder else free.unlink()
        raise
    return free


def _first_free(path: Path, make: Callable[[Path], None]) -> Path:
    for number in count(1):
        free = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            make(free)
            return free
    raise AssertionError


def _make_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def _acquire(path: Path) -> int | str:
    """Lock the file: its descriptor, or the token in a file where that itself is the lock."""
    try:
        import fcntl
    except ImportError:
        return _create(path)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise _in_use(path) from None
            if error.errno in _NO_LOCKS:
                return _create(path)
            raise
        if _is(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _signature(), 0)
            _held.add(descriptor)
            return descriptor
        os.close(descriptor)  # its last owner has removed the file in between


def _create(path: Path) -> str:
    """Own by a file that only one process can create; the token in it."""
    missing(path, "file locks", "a process killed on another machine keeps its folder owned")
    owner = path.with_name(_OWNER)
    with suppress(OSError):
        path.unlink()
    _drop_stale(owner)
    try:
        _make_file(owner)
    except FileExistsError:
        raise _in_use(owner) from None
    token = os.urandom(8).hex()
    _tokens.add(token)
    owner.write_bytes(_signature(token))
    return token


def _drop_stale(owner: Path) -> None:
    """Remove the file of a dead process of this machine; one process at a time may do that."""
    if not _stale(owner):
        return
    guard = owner.with_name(f"{_OWNER}.removal")
    try:
        _make_file(guard)
    except FileExistsError:
        return
    try:
        if _stale(owner):
            owner.unlink()
    finally:
        guard.unlink()


def _stale(owner: Path) -> bool:
    pid, host, _, token = _read_signature(owner)
    if host != HOST or pid is None or token in _tokens:
        return False
    return pid == os.getpid() or not alive(pid)


def _release(path: Path, lock: int | str) -> None:
    """Remove the file, unless the folder was moved and it is another's."""
    with suppress(OSError):
        if isinstance(lock, str):
            owner = path.with_name(_OWNER)
            if _read_signature(owner)[3] == lock:
                owner.unlink()
            _tokens.discard(lock)
        elif _is(path, lock):
            path.unlink()
    if isinstance(lock, int):
        _held.discard(lock)
        os.close(lock)


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _signature(token: str = "") -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return dump_json({"pid": os.getpid(), "host": HOST, "since": since, "token": token}).encode()


def _read_signature(path: Path) -> tuple[int | None, str, str, str]:
    """Process id, host, start and token of the owner, as far as they can be read."""
    try:
        found = read_json(path, max_bytes=4096)
        pid, text = int(found["pid"]), [str(found[key]) for key in ("host", "since", "token")]
        return pid, text[0], text[1], text[2]
    except (OSError, DamagedFileError, KeyError, TypeError, ValueError):
        return None, "", "", ""


def _in_use(path: Path) -> FolderInUseError:
    pid, host, since, _ = _read_signature(path)
    who = "another process"
    if pid is not None:
        who = f"process {pid} on {printable(host)} since {printable(since)}"
    way_out = "wait for it, stop it, or use another folder"
    if (pid, host) == (os.getpid(), HOST):
        way_out = "that is this process: close() the recorder or what else works there, or use "
        way_out += "another folder"
    if path.name == _OWNER:
        way_out += f"; if it is gone, delete {path}"
    return FolderInUseError(f"folder {path.parent} is in use by {who}: {way_out}")


def _close_in_child() -> None:
    """A forked child would keep the lock after its parent's end."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
