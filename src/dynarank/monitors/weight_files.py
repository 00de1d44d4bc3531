"""Access to a model's safetensors files, checked when opened and read one tensor at a time.

Files are read with ``pread`` instead of being memory-mapped: pages of a mapped file count as
resident memory once they are read, and the process is killed if a file is truncated while mapped.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
        ValueError: it is not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        self.path = path
        try:
            self._file = safe_open(path, "pt", backend="pread")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
        self.tensors = {name: self._stored(name) for name in self._file.offset_keys()}

    def read(self, name: str) -> Tensor:
        """Read the tensor of this name; 8-bit floats are converted to fp32.

        Raises:
            ValueError: the file has become shorter since it was opened.
        """
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path} is not a complete safetensors file: {error}") from error
        return tensor.float() if tensor.dtype.itemsize == 1 else tensor

    def _stored(self, name: str) -> StoredTensor:
        header = self._file.get_slice(name)
        return StoredTensor(tuple(header.get_shape()), _FLOATS.get(header.get_dtype()))


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
            damaged or does not match its shards.
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
    places = _weight_map(index)
    counts = Counter(places.values())
    homes: dict[str, TensorFile] = {}
    for shard in sorted(counts):
        if PurePath(shard).name != shard:
            raise ValueError(f"{index} names a shard outside its folder: {shard!r}")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(
                f"shard {shard} of {index} is missing: {counts[shard]} of {len(places)} tensors"
            )
        file = TensorFile(index.parent / shard)
        wanted = {name for name, place in places.items() if place == shard}
        if lost := sorted(wanted - file.tensors.keys()):
            raise ValueError(
                f"{index} does not match its shards: {lost[0]!r} should be in {shard}; "
                f"{len(lost)} tensors are missing there"
            )
        homes |= {name: file for name in file.tensors if name in wanted}
    return homes


def _weight_map(index: Path) -> dict[str, str]:
    try:
        data: Any = json.loads(index.read_text(encoding="utf-8"))
        places: dict[str, str] = data["weight_map"]
        if not all(isinstance(place, str) for place in places.values()):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError("a tensor's shard is not a file name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not a safetensors index, with a weight_map from tensors to shards: {error}"
        ) from error
    return places
