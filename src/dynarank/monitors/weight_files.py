"""Access to a model's safetensors files, checked when opened and read one tensor at a time.

Files are read with ``pread`` instead of being memory-mapped: pages of a mapped file count as
resident memory once they are read, and the process is killed if a file is truncated while mapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynarank.files.json_data import DamagedFileError, read_json
from dynarank.files.printable import printable
from dynarank.files.tensors import check_header

__all__ = ["StoredTensor", "TensorFile", "WeightFiles", "open_weights"]

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


_OTHERS = {b"PK": "a zip file, as torch.save and numpy write", b"\x80": "a pickle"}


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a stored tensor, known before it is read.

    Args:
        shape: its shape.
        dtype: its dtype; None if it is not a floating-point dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class TensorFile:
    """One safetensors file: its tensors by name, in the order in which they are stored.

    Args:
        path: the file. Its header is read and checked against the file size immediately.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedFileError: it is not a complete safetensors file, or not a regular file.
        ValueError: this process may not address so much memory.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"no file {path}")
        self.path = path
        try:
            self._file = safe_open(_regular(path), "pt", backend="pread")
        except SafetensorError as error:
            raise _incomplete(path, error) from error
        except MemoryError as error:
            size = path.stat().st_size
            raise ValueError(f"{path} cannot be opened, {size:,} bytes: {error}") from error
        check_header(path.resolve())  # a cache of models has links to files elsewhere
        self.tensors = {name: self._stored(name) for name in self._file.offset_keys()}

    def read(self, name: str) -> Tensor:
        """Read the tensor of this name; 8-bit floats are converted to fp32.

        Raises:
            DamagedFileError: the file has become shorter since it was opened.
        """
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise _incomplete(self.path, error) from error
        return tensor.float() if tensor.dtype.itemsize == 1 else tensor

    def _stored(self, name: str) -> StoredTensor:
        header = self._file.get_slice(name)
        return StoredTensor(tuple(header.get_shape()), _FLOATS.get(header.get_dtype()))


def _regular(path: Path) -> Path:
    """The path, if no pipe, device or folder is there: opening those may wait or never end."""
    if not path.is_file():
        raise DamagedFileError(path, "it is not a regular file")
    return path


def _incomplete(path: Path, error: Exception) -> DamagedFileError:
    with path.open("rb") as file:
        begins = file.read(2)
    what = next((name for mark, name in _OTHERS.items() if begins.startswith(mark)), "")
    told = f"it is not a complete safetensors file: {printable(str(error))}"
    if not what:
        return DamagedFileError(path, told)
    return DamagedFileError(path, told, f"it looks like {what}: save its tensors as safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """A model's tensors by name, each with the file that contains it."""

    path: Path
    homes: dict[str, TensorFile]

    def stored(self, name: str) -> StoredTensor:
        """The shape and dtype of a tensor, without reading it."""
        return self.homes[name].tensors[name]


def open_weights(path: Path) -> WeightFiles:
    """Open the weights at a path; all headers are read and checked, but no tensors.

    Args:
        path: a .safetensors file, the index of a sharded model, or a folder with either, such as a
            Hugging Face model or a run.

    Raises:
        FileNotFoundError: the path does not exist, a folder without weights, or a missing shard.
        ValueError: a folder with several runs, a truncated or corrupt file, an index that is
            damaged or does not match its shards; all but the first as DamagedFileError.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    file = _main_file(path) if path.is_dir() else path
    if file.name.endswith(".json"):
        return WeightFiles(path, _sharded(file))
    whole = TensorFile(file)
    return WeightFiles(path, dict.fromkeys(whole.tensors, whole))


def _main_file(folder: Path) -> Path:
    for name in (_FILE, _INDEX):
        if (folder / name).is_file():
            return folder / name
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(file.name for file in found)
            raise ValueError(f"{folder} contains several files of weights, name one: {listed}")
    if runs := sorted(file.parent for file in folder.glob(f"*/{_FILE}")):
        listed = ", ".join(map(str, runs))
        raise ValueError(f"{folder} contains several runs, name one or two of: {listed}")
    if (folder / "records.jsonl").is_file():
        raise FileNotFoundError(f"the run {folder} has no {_FILE}: it has not finished")
    raise FileNotFoundError(f"{folder} contains no weights: neither {_FILE} nor {_INDEX}")


def _sharded(index: Path) -> dict[str, TensorFile]:
    """The tensors of the shards, in their order; the index must match the shards."""
    homes: dict[str, TensorFile] = {}
    shards = _by_shard(index)
    count = sum(map(len, shards.values()))
    for shard, names in sorted(shards.items()):
        shown = printable(shard)
        if PurePath(shard).name != shard or "\0" in shard:
            raise DamagedFileError(index, f"it names a shard outside its folder: {shown!r}")
        if not (index.parent / shard).exists():
            raise FileNotFoundError(
                f"shard {shown} of {index} is missing: {len(names)} of {count} tensors"
            )
        file = TensorFile(index.parent / shard)
        if lost := sorted(names - file.tensors.keys()):
            raise DamagedFileError(
                index,
                f"it does not match its shards: {printable(lost[0])!r} should be in {shown}; "
                f"{len(lost)} tensors are missing there",
            )
        homes |= {name: file for name in file.tensors if name in names}
    return homes


def _by_shard(index: Path) -> dict[str, set[str]]:
    """The names of the tensors in each shard."""
    data: Any = read_json(index.resolve())  # a cache of models has links to files elsewhere
    places: Any = data.get("weight_map") if isinstance(data, dict) else None  # pyright: ignore[reportUnknownMemberType]
    found: dict[str, set[str]] = {}
    for name, shard in places.items() if isinstance(places, dict) else [("", None)]:
        if not isinstance(shard, str):
            raise DamagedFileError(
                index, "it is not a safetensors index, with a weight_map from tensors to shards"
            )
        found.setdefault(shard, set()).add(name)
    return found
