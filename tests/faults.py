"""Faults in what a process asks of its volume: a kill or an error at the n-th call."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dynarank.checkpoint.folder import Contents
from dynarank.checkpoint.manifest import MANIFEST, Entry, Manifest
from dynarank.files.reading import sha256

# Everything by which files/ and checkpoint/ change a volume.
CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod")
_write = os.write
FULL = os.environ.get("DYNARANK_FAULTS") == "full"


def trials(few: int, full: int) -> int:
    """How many trials: few as a rule, all of them under DYNARANK_FAULTS=full."""
    return full if FULL else few


def some(few: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """A test's cases: the few as a rule, the others too under DYNARANK_FAULTS=full."""
    return [*few, *others] if FULL else [*few]


@contextmanager
def at_calls(action: Callable[[int, str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Run ``action(n, name, args)`` before the n-th call of the system."""
    count = 0

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            action(count, name, args)
            return call(*args, **kwargs)

        return run

    with ExitStack() as patches:
        for name in CALLS:
            patches.enter_context(patch.object(os, name, wrapped(name, getattr(os, name))))
        yield


def count_calls(run: Callable[[], object]) -> list[str]:
    """The calls that ``run`` makes, by name."""
    names: list[str] = []
    with at_calls(lambda _, name, __: names.append(name)):
        run()
    return names


def killing(at: int) -> Callable[[int, str, tuple[Any, ...]], None]:
    """Kill this process at a call; a write is cut in its middle."""

    def action(n: int, name: str, args: tuple[Any, ...]) -> None:
        if n == at:
            if name == "write":
                _write(args[0], memoryview(args[1])[: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    return action


def failing(at: Callable[[int, str], bool], number: int) -> Callable[..., None]:
    """Raise OSError at some calls; a write is cut in its middle, as on a full disk."""

    def action(n: int, name: str, args: tuple[Any, ...]) -> None:
        reads = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR)
        if at(n, name) and not reads:
            if name == "write":
                _write(args[0], memoryview(args[1])[: len(args[1]) // 2])
            raise OSError(number, os.strerror(number))

    return action


def in_child(run: Callable[[int], object]) -> tuple[int, int]:
    """Fork and run with a pipe to write into; the process's id and the pipe's reading end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            run(writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    return pid, reading


def wait_for(pid: int, reading: int) -> tuple[int, bytes]:
    """The exit status of a child (negative: its signal) and all that it has written."""
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def contents(step: int, size: int = 64) -> Contents:
    """What a run would save at a step: equal steps, equal contents."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(size, generator=generator)
    return Contents(
        {"model": {"weight": weight, "bias": weight[:3]}, "optimizer": {"mean": weight * 2}},
        {"state": {"step": step}, "events": [{"at": n} for n in range(step)]},
    )


def equal(one: Contents, other: Contents) -> bool:
    tensors = [
        {f"{file}/{name}": t for file, group in c.tensors.items() for name, t in group.items()}
        for c in (one, other)
    ]
    return (
        one.data == other.data
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every symbolic link."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def seal(folder: Path, step: int | None = None) -> None:
    """A manifest that fits what is in the folder: someone else's damage, not an accident's."""
    names = [path.name for path in folder.iterdir() if path.name != MANIFEST]
    files = {n: Entry((folder / n).stat().st_size, sha256(folder / n)) for n in sorted(names)}
    (folder / MANIFEST).write_bytes(Manifest(files, step).dump())


def litter(folder: Path) -> list[str]:
    """Temporary names that are left in a folder."""
    return [name for name in os.listdir(folder) if name.endswith((".tmp", ".previous"))]
