"""Access to a model's files of weights, checked when opened and read one tensor at a time.

safetensors files are read with ``pread`` instead of being memory-mapped: pages of a mapped file
count as resident memory once they are read, and the process is killed if a file is truncated while
mapped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynarank.files.json_data import DamagedFileError, read_json
from dynarank.files.printable import printable
from dynarank.files.tensors import check_header
from dynarank.monitors.foreign_files import refuse_foreign
from dynarank.monitors.stored_tensor import StoredTensor, dtype_name
from dynarank.monitors.torch_files import TorchFile

__all__ = ["FileOfTensors", "TensorFile", "WeightFiles", "open_weights"]

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FILES = (_FILE, _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_PATTERNS = (
    "*.safetensors.index.json",
    "*.safetensors",
    "*.bin.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
)
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_OTHERS = {
    "F4": "float4_e2m1",
    "F6_E2M3": "float6_e2m3",
    "F6_E3M2": "float6_e3m2",
    "F8_E8M0": "float8_e8m0",
    "BOOL": "bool",
    "C64": "complex64",
}
_KINDS = {"U": "uint", "I": "int"}
_LIKE = {b"PK": "a zip file, as torch.save writes", b"\x80": "a pickle"}


class FileOfTensors(Protocol):
    """A file of tensors by name, in their order, read one by one."""

    path: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor, or one entry of its first dimension; 8-bit floats come in fp32."""
        ...


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

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor, or one entry of its first dimension; 8-bit floats are converted to fp32.

        Raises:
            DamagedFileError: the file has become shorter since it was opened.
        """
        try:
            if index is None:
                tensor: Tensor = self._file.get_tensor(name)
            else:
                tensor = self._file.get_slice(name)[index]
        except SafetensorError as error:
            raise _incomplete(self.path, error) from error
        small = tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
        return tensor.float() if small else tensor

    def _stored(self, name: str) -> StoredTensor:
        header = self._file.get_slice(name)
        kind: str = header.get_dtype()
        dtype = _FLOATS.get(kind)
        known = _OTHERS.get(kind) or _KINDS.get(kind[0], kind[0]) + kind[1:]
        return StoredTensor(tuple(header.get_shape()), dtype, dtype_name(dtype) if dtype else known)


def _open(path: Path) -> FileOfTensors:
    """A file of tensors by its content; what is called .safetensors must be that.

    Raises:
        FileNotFoundError: it does not exist.
        DamagedFileError: it is damaged, or of a format that is not read: the message names it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    refuse_foreign(_regular(path))
    if path.suffix == ".safetensors" or not _begins(path).startswith(tuple(_LIKE)):
        return TensorFile(path)
    return TorchFile(path)


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def _regular(path: Path) -> Path:
    """The path, if no pipe, device or folder is there: opening those may wait or never end."""
    if not path.is_file():
        raise DamagedFileError(path, "it is not a regular file")
    return path


def _incomplete(path: Path, error: Exception) -> DamagedFileError:
    begins = _begins(path)
    what = next((name for mark, name in _LIKE.items() if begins.startswith(mark)), "")
    told = f"it is not a complete safetensors file: {printable(str(error))}"
    if not what:
        return DamagedFileError(path, told)
    return DamagedFileError(path, told, f"it looks like {what}: give it the ending .pt")


@dataclass(frozen=True)
class WeightFiles:
    """A model's tensors by name, each with the file that contains it.

    Args:
        path: what was asked for.
        homes: the file of each tensor, by its name without what wrappers add to it: ``module.`` of
            DataParallel and DDP, ``_orig_mod.`` of ``torch.compile``.
        names: the names of tensors in their files.
        config: ``config.json`` beside the files, empty if there is none.
        adapter: ``adapter_config.json`` of PEFT beside the files, empty if there is none.
    """

    path: Path
    homes: Mapping[str, FileOfTensors]
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    adapter: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def stored(self, name: str) -> StoredTensor:
        """The shape and dtype of a tensor, without reading it."""
        return self.homes[name].tensors[self.names[name]]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor, or one entry of its first dimension; 8-bit floats come in fp32."""
        return self.homes[name].read(self.names[name], index)


def open_weights(path: Path) -> WeightFiles:
    """Open the weights at a path; all headers are read and checked, but no tensors.

    Args:
        path: a .safetensors file or one of ``torch.save`` (.bin, .pt, .pth), the index of a sharded
            model, or a folder with one of them, such as a Hugging Face model or a run. Configs
            beside it are read as well.

    Raises:
        FileNotFoundError: the path does not exist, a folder without weights, or a missing shard.
        ValueError: a folder with several runs, a truncated or corrupt file, an index that is
            damaged or does not match its shards; all but the first as DamagedFileError.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    file = _main_file(path) if path.is_dir() else path
    if file.name.endswith(".json"):
        homes = _sharded(file)
    else:
        whole = _open(file)
        homes = dict.fromkeys(whole.tensors, whole)
    config, adapter = (
        _config(file.parent / f"{name}.json") for name in ("config", "adapter_config")
    )
    names = _plain_names(homes)
    plain = {name: homes[stored] for name, stored in names.items()}
    return WeightFiles(path, plain, names, config, adapter)


def _plain_names(stored: Collection[str]) -> dict[str, str]:
    """The names in files by those that the plain model has for them."""
    names = {name.replace("_orig_mod.", ""): name for name in stored}
    while names and all(name.startswith("module.") for name in names):
        names = {name.removeprefix("module."): one for name, one in names.items()}
    return names if len(names) == len(stored) else {name: name for name in stored}


def _config(path: Path) -> Mapping[str, Any]:
    """A config beside the weights; one that cannot be read is as good as none."""
    if not path.is_file():
        return {}
    try:
        found: Any = read_json(path.resolve())
    except (DamagedFileError, OSError):
        return {}
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _main_file(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    for pattern in _PATTERNS:
        found = sorted(set(folder.glob(pattern)) - set(folder.glob("training_args.bin")))
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
    raise FileNotFoundError(
        f"{folder} contains no weights: neither {_FILE}, {_INDEX} nor a .bin, .pt or .pth"
    )


def _sharded(index: Path) -> dict[str, FileOfTensors]:
    """The tensors of the shards, in their order; the index must match the shards."""
    homes: dict[str, FileOfTensors] = {}
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
        file = _open(index.parent / shard)
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
