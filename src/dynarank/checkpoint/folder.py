"""A checkpoint is a folder: tensors as safetensors, the rest as JSON, a manifest written last.

It is written beside its place and renamed, so that a folder of its name is whole. Where it replaces
another, that one is kept until the new one is in place: at no time is there none.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dynarank.checkpoint.findings import ALONE, in_all
from dynarank.checkpoint.manifest import (
    MANIFEST,
    Entry,
    Manifest,
    check_name,
    is_name,
    read_manifest,
)
from dynarank.checkpoint.shards import Shard, Stored, is_shard_file, piece_like
from dynarank.distributed.processes import Processes
from dynarank.files.atomic import remove, remove_orphans, temporary_beside, write_chunks
from dynarank.files.json_data import dump_json, read_json
from dynarank.files.ownership import rename_free
from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError, sha256
from dynarank.files.tensors import load_tensors, tensor_chunks
from dynarank.files.volume import MISSING, missing, sync_folder

__all__ = [
    "Contents",
    "discard",
    "prepare",
    "put",
    "put_in_place",
    "read_data",
    "read_folder",
    "settle",
    "verify_folder",
    "write_files",
    "write_folder",
]

_SPARE = 1.2  # free space asked for, relative to the size: other processes write too
_MAX_JSON = 64 << 20
_OF_THE_SYSTEM = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_WAY_OUT = "use another checkpoint"
_PIECE = 16 << 20  # bytes
_TRIES = 20  # a writer may replace a checkpoint while it is read


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds: a safetensors or JSON file for each entry.

    Args:
        tensors: tensors by name, for each file ``<name>.safetensors``.
        data: plain data, for each file ``<name>.json``.
        shards: pieces of tensors, by ``<name of the file>/<name of the tensor>``.
        stored: in place of ``tensors``, for several processes: each reads what it needs.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict, repr=False)
    stored: Stored | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """The bytes of the tensors that this process writes."""
        tensors = [t for file in self.tensors.values() for t in file.values()]
        tensors += [shard.local for shard in self.shards.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def outline(self, part: str) -> Mapping[str, Tensor]:
        """The tensors of a part; those that are read later without values."""
        return self.tensors.get(part, {}) if self.stored is None else self.stored.outline(part)

    def read(self, part: str, likes: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """The tensors of a part; of those like a sharded one, this process's pieces.

        Args:
            part: its name.
            likes: sharded tensors, by ``<name of the part>/<name of the tensor>``.
        """
        likes = likes or {}
        if self.stored is not None:
            return self.stored.read(part, likes)
        found = self.tensors.get(part, {})
        return {name: piece_like(t, likes.get(f"{part}/{name}")) for name, t in found.items()}


def write_folder(
    folder: Path, contents: Contents, *, sync: bool = True, step: int | None = None
) -> None:
    """Write a checkpoint: all of it, or what was there stays.

    Args:
        folder: its path. An existing checkpoint is replaced; nothing else is.
        contents: what to write.
        sync: wait until it is on the device.
        step: the step of the run, written into the manifest.

    Raises:
        ValueError: the folder holds something else than a checkpoint, or the contents cannot be
            written.
        OSError: the volume is full, read-only or fails.

    Example:
        >>> folder = getfixture("tmp_path") / "checkpoint"
        >>> write_folder(folder, Contents({"model": {"weight": torch.ones(2)}}, {"state": [1]}))
        >>> sorted(path.name for path in folder.iterdir())
        ['MANIFEST.json', 'model.safetensors', 'state.json']
        >>> read_folder(folder).data
        {'state': [1]}
    """
    folder = Path(os.path.realpath(folder))
    prepare(folder, contents.size)
    with temporary_beside(folder) as beside:
        beside.mkdir()
        put(beside, folder, write_files(beside, contents, sync=sync), sync=sync, step=step)


def prepare(folder: Path, size: int) -> None:
    """Make sure that a checkpoint of so many bytes can be written; raises as ``write_folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(folder.parent, f"{folder.name}.")
    settle(folder)
    _check_replaceable(folder)
    _check_space(folder.parent, size)


def write_files(folder: Path, contents: Contents, *, sync: bool = True) -> dict[str, Entry]:
    """Write tensors and data into a folder, which becomes a checkpoint when it is put in place.

    Raises:
        ValueError: something cannot be written; nothing has been then.
        OSError: the volume is full, read-only or fails.
    """
    files = _files(contents)
    return {
        name: Entry(*write_chunks(folder / name, chunks, sync=sync))
        for name, chunks in files.items()
    }


def put(
    beside: Path,
    folder: Path,
    files: dict[str, Entry],
    *,
    sync: bool = True,
    step: int | None = None,
) -> None:
    """Write the manifest of these files and put the folder in its place.

    What was there is kept until then. Where folders cannot be renamed the files are copied.
    """
    write_chunks(beside / MANIFEST, [Manifest(files, step).dump()], sync=sync)
    if sync:
        sync_folder(beside)
    if not put_in_place(beside, folder, sync=sync):
        _copy(beside, folder, [*files, MANIFEST], sync)


def read_folder(
    folder: Path,
    verify: Literal["full", "size"] = "full",
    *,
    step: int | None = None,
    processes: Processes = ALONE,
) -> Contents:
    """Read a checkpoint, and refuse it if a file is not as it was written.

    Args:
        folder: its path.
        verify: "full" compares sizes and SHA-256, "size" only sizes: faster, and does not see a
            flipped bit in a tensor.
        step: the step that it must be of.
        processes: all that read it: each verifies a share of the files, and reads tensors later.

    Raises:
        FileNotFoundError: there is no such folder.
        DamagedFileError: a file has changed, is missing, was added or is not a regular file: which.
        NewerFormatError: a newer version wrote it.
    """
    if processes.size > 1:
        return in_all(
            processes, f"reading {folder}", lambda: _read(folder, verify, step, processes)
        )
    for left in reversed(range(_TRIES)):
        place = _whole(folder)
        read = _identity(place)
        try:
            contents = _read(place, verify, step)
        except (DamagedFileError, FileNotFoundError):
            if not left or _identity(_whole(folder)) == read:
                raise
        else:
            if _identity(_whole(folder)) == read:
                return contents
    raise DamagedFileError(folder, f"it was replaced {_TRIES} times while it was read", "try again")


def _read(
    folder: Path, verify: Literal["full", "size"], step: int | None, processes: Processes = ALONE
) -> Contents:
    folder = _whole(folder)
    names = verify_folder(folder, verify, step=step, processes=processes).files
    data = {
        name.removesuffix(".json"): read_json(folder / name, max_bytes=_MAX_JSON)
        for name in names
        if name.endswith(".json")
    }
    tables = [name for name in names if name.endswith(".safetensors")]
    if processes.size > 1:
        return Contents(data=data, stored=Stored(folder, tables))
    if any(map(is_shard_file, tables)):
        stored = Stored(folder, tables)
        return Contents({part: stored.read(part) for part in stored.parts()}, data)
    return Contents({Path(name).stem: load_tensors(folder / name) for name in tables}, data)


def read_data(folder: Path, name: str) -> Any:
    """Read one part of the data of a checkpoint; raises as :func:`read_folder`.

    Of the other files only the sizes are compared.
    """
    folder = _whole(folder)
    entry = verify_folder(folder, "size").files.get(f"{name}.json")
    if entry is None:
        raise DamagedFileError(folder, f"it has no {name}.json", "use a folder that dr.save wrote")
    _compare(folder / f"{name}.json", entry, "full")
    return read_json(folder / f"{name}.json", max_bytes=_MAX_JSON)


def verify_folder(
    folder: Path,
    verify: Literal["full", "size"] = "full",
    *,
    step: int | None = None,
    processes: Processes = ALONE,
) -> Manifest:
    """Compare a checkpoint's files with its manifest, and the step with that of its name.

    Each of several processes computes the SHA-256 of a share of the files, and raises by itself.

    Raises:
        FileNotFoundError: there is no such folder.
        DamagedFileError: a file has changed, is missing, was added or is not a regular file: which.
        NewerFormatError: a newer version wrote it.
    """
    if verify not in ("full", "size"):
        raise ValueError(f"verify is 'full' or 'size', not {verify!r}")
    folder = _whole(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint {folder}")
    if not folder.is_dir():
        raise DamagedFileError(folder, "it is not a folder", _WAY_OUT)
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        raise DamagedFileError(folder, f"it has no {MANIFEST}", _WAY_OUT) from None
    if step is not None and manifest.step != step:
        raise DamagedFileError(folder, f"it is the checkpoint of step {manifest.step}", _WAY_OUT)
    for name in sorted({MANIFEST, *manifest.files} ^ (_names(folder))):
        problem = "it is missing" if name in manifest.files else f"it is not in {MANIFEST}"
        raise DamagedFileError(folder / printable(name), problem, _WAY_OUT)
    for number, (name, entry) in enumerate(manifest.files.items()):
        mine = number % processes.size == processes.rank
        _compare(folder / name, entry, verify if mine else "size")
    return manifest


def settle(folder: Path) -> None:
    """Finish a replacement that was cut: the old checkpoint returns if the new is not there."""
    previous = _previous(folder)
    if previous.is_dir():
        if folder.exists():
            discard(previous, folder)
        else:
            os.rename(previous, folder)


def discard(path: Path, of: Path | None = None) -> None:
    """Remove a folder (``of`` another) such that, if that is cut, nothing of its name is left."""
    with temporary_beside(of or path) as beside:
        os.rename(path, beside)


def _whole(folder: Path) -> Path:
    """The folder, or the one that it was to replace when the writer was cut."""
    folder = Path(os.path.realpath(folder))
    return _previous(folder) if not folder.exists() and _previous(folder).is_dir() else folder


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from the one that replaces it while it is read."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _names(folder: Path) -> set[str]:
    """What lies in a folder, but for what file systems and file managers leave there."""
    return {name for name in os.listdir(folder) if not _of_the_system(name)}


def _of_the_system(name: str) -> bool:
    return name in _OF_THE_SYSTEM or name.startswith(".nfs")


def _compare(path: Path, entry: Entry, verify: str) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise DamagedFileError(path, "it is missing", _WAY_OUT) from None
    if not stat.S_ISREG(status.st_mode):
        raise DamagedFileError(path, "it is not a regular file", _WAY_OUT)
    if status.st_size != entry.size:
        problem = f"it has {status.st_size:,} bytes, and was written with {entry.size:,}"
        raise DamagedFileError(path, problem, _WAY_OUT)
    if verify == "full" and sha256(path) != entry.sha256:
        problem = "it has changed since it was written (SHA-256 differs)"
        raise DamagedFileError(path, problem, _WAY_OUT)


def _files(contents: Contents) -> dict[str, Iterable[bytes | memoryview]]:
    """The bytes of every file; what cannot be written is refused before anything is."""
    files: dict[str, Iterable[bytes | memoryview]] = {}
    for stem, tensors in contents.tensors.items():
        files[f"{stem}.safetensors"] = tensor_chunks(tensors)
    for stem, data in contents.data.items():
        text = dump_json(data).encode()
        if len(text) > _MAX_JSON:
            raise ValueError(
                f"{stem}.json would have {len(text):,} bytes, at most {_MAX_JSON:,} are"
                " read: put arrays into tensors"
            )
        files[f"{stem}.json"] = [text]
    for name in files:
        check_name(name)
    return files


def put_in_place(beside: Path, folder: Path, *, sync: bool) -> bool:
    """Rename a folder into place, keeping what was there until then; False if the volume cannot."""
    previous = _previous(folder)
    replaces = folder.exists()
    if replaces:
        os.rename(folder, previous)
    try:
        os.rename(beside, folder)
    except OSError as error:
        if replaces:
            os.rename(previous, folder)
        if replaces or error.errno not in {*MISSING, errno.EXDEV}:
            raise
        return False
    if sync:
        sync_folder(folder.parent)
    if replaces:
        discard(previous, folder)
    return True


def _copy(beside: Path, folder: Path, names: Sequence[str], sync: bool) -> None:
    """Copy a new checkpoint where folders cannot be renamed: it counts once it has a manifest."""
    missing(folder, "rename", f"a folder without {MANIFEST} is a checkpoint that was not finished")
    folder.mkdir()
    try:
        for name in names:
            with open(beside / name, "rb") as file:
                write_chunks(folder / name, iter(lambda: file.read(_PIECE), b""), sync=sync)
        if sync:
            sync_folder(folder)
            sync_folder(folder.parent)
    except BaseException:
        remove(folder)
        raise


def _check_replaceable(folder: Path) -> None:
    """Refuse to write over anything but a checkpoint; a damaged one is moved aside."""
    if not folder.exists():
        return
    foreign = _names(folder) if folder.is_dir() else {folder.name}
    try:
        if folder.is_dir() and foreign:
            foreign -= {MANIFEST, *read_manifest(folder).files}
    except FileNotFoundError:
        pass
    except DamagedFileError:
        foreign = {name for name in foreign if name != MANIFEST and not is_name(name)}
        if not foreign:
            rename_free(folder, f"{folder.name}.damaged")
    if foreign:
        raise ValueError(
            f"{folder} is no checkpoint, or holds more than one ({printable(min(foreign))}):"
            " nothing was written; give a new folder, or move it away"
        )


def _check_space(parent: Path, size: int) -> None:
    total, _, free = shutil.disk_usage(parent)
    if total and free < _SPARE * size:  # object stores report no size at all
        text = f"{os.strerror(errno.ENOSPC)}: a checkpoint of {size:,} bytes, {free:,} are free"
        raise OSError(errno.ENOSPC, text, str(parent))
