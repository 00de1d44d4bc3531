"""One checkpoint written by several processes into one folder, whole or not at all.

The first process makes the folder beside its place, all write their files into it, and the first
seals it with the manifest and renames it. Where one fails, all do, and what was there stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from dynarank.checkpoint.folder import Contents, prepare, put, write_files, write_folder
from dynarank.checkpoint.manifest import Entry
from dynarank.checkpoint.shards import shard_file
from dynarank.distributed.processes import Processes
from dynarank.files.atomic import temporary_beside

__all__ = ["write_together"]

_T = TypeVar("_T")


def write_together(
    folder: Path,
    contents: Contents,
    processes: Processes,
    *,
    sync: bool = True,
    step: int | None = None,
) -> None:
    """Write the contents of all processes; a file that several have is written by the first.

    Args:
        folder: its path, the same in all processes, on a file system that they share.
        contents: of this process.
        processes: all of them.
        sync: see :func:`write_folder`, whose errors are raised too.
        step: see :func:`write_folder`.

    Raises:
        DisagreementError: processes are about other folders or steps; the message names both.
        PeerError: it failed in another process only.
    """
    if processes.size == 1:
        return write_folder(folder, contents, sync=sync, step=step)
    folder = Path(os.path.realpath(folder))
    processes.agree("the checkpoint to write", {"folder": str(folder), "step": step})
    sizes = processes.gather("the size of the checkpoint", contents.size)
    with ExitStack() as stack:

        def begin() -> Path:
            prepare(folder, sum(sizes))
            beside = stack.enter_context(temporary_beside(folder))
            beside.mkdir()
            return beside

        what = f"writing {folder}"
        beside = _by_first(processes, what, begin)
        files = _write(beside, _own(contents, processes), processes, what, sync)
        _by_first(processes, what, lambda: put(beside, folder, files, sync=sync, step=step))


def _by_first(processes: Processes, what: str, function: Callable[[], _T]) -> _T:
    """What the first process's call returns."""
    made = processes.attempt(what, function if processes.rank == 0 else lambda: None)
    return processes.from_first(what, made)  # type: ignore[return-value]


def _own(contents: Contents, processes: Processes) -> Contents:
    """The contents without the files that a process before this one has too."""
    names = [*contents.tensors, *contents.data]
    rows = processes.gather("the files of the checkpoint", names)
    before = {name for row in rows[: processes.rank] for name in row}
    return replace(
        contents,
        tensors={name: one for name, one in contents.tensors.items() if name not in before},
        data={name: one for name, one in contents.data.items() if name not in before},
    )


def _write(
    beside: Path, contents: Contents, processes: Processes, what: str, sync: bool
) -> dict[str, Entry]:
    """Write this process's files; those of all."""
    files = processes.attempt(what, lambda: write_files(beside, contents, sync=sync))
    if any(processes.gather("whether there are shards", bool(contents.shards))):
        from dynarank.checkpoint.dcp import write_shards  # slow to import

        path = beside / shard_file(processes.rank)
        files |= write_shards(path, contents.shards, processes, sync=sync)
    rows = processes.gather("the files that were written", files)
    return {name: entry for row in rows for name, entry in row.items()}
