"""Tensors in safetensors files: streamed to disk, and read by safetensors' own reader."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynarank.files.atomic import replacing, write_chunks
from dynarank.files.json_data import dump_json, parse_json
from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError, reading

__all__ = ["TensorFile", "check_header", "load_tensors", "save_tensors", "tensor_chunks"]

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_METADATA = "__metadata__"


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file: the whole file, or the old one stays.

    Args:
        path: the file.
        tensors: by name, of any shape, strides and device; those that share memory are each
            written.
        metadata: text by name, in the file's header.

    Raises:
        ValueError: a tensor is sparse, quantized, on the meta device, or of a dtype that
            safetensors does not know.

    Example:
        >>> path = getfixture("tmp_path") / "model.safetensors"
        >>> save_tensors(path, {"weight": torch.ones(2, 3)})
        >>> load_tensors(path)["weight"].shape
        torch.Size([2, 3])
    """
    chunks = tensor_chunks(tensors, metadata)
    with replacing(path) as beside:
        write_chunks(beside, chunks, sync=False)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: safetensors refuses it (cut, overlapping or missing bytes, sizes that do
            not fit), a name appears twice, or it is not a regular file.

    Example:
        >>> path = getfixture("tmp_path") / "model.safetensors"
        >>> save_tensors(path, {"weight": torch.ones(2, 3)})
        >>> list(load_tensors(path))
        ['weight']
    """
    check_header(path)
    try:
        with safe_open(path, "pt", backend="pread") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise DamagedFileError(path, printable(str(error))) from error


def check_header(path: Path) -> dict[str, Any]:
    """The header; what safetensors' reader does not look at is refused: keys that appear twice.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the header is cut, or not JSON with each key once.
    """
    with reading(path) as descriptor:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER):
            raise DamagedFileError(path, "it is not a complete safetensors file")
        header = os.pread(descriptor, length, 8)
    found = parse_json(header, f"the header of {path}", max_bytes=_MAX_HEADER)
    if not isinstance(found, dict):
        raise DamagedFileError(path, "its header is not a JSON object")
    return found


class TensorFile:
    """A safetensors file that is kept open, whose tensors are read whole or in part.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: see :func:`load_tensors`.

    Example:
        >>> path = getfixture("tmp_path") / "model.safetensors"
        >>> save_tensors(path, {"weight": torch.arange(6).view(2, 3)})
        >>> TensorFile(path).read("weight", (slice(0, 2), slice(1, 2)))
        tensor([[1],
                [4]])
    """

    def __init__(self, path: Path) -> None:
        header = check_header(path)
        try:
            self._file = safe_open(path, "pt", backend="pread")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.outlines: dict[str, Tensor] = {
                name: torch.empty(
                    header[name]["shape"], dtype=_DTYPES[header[name]["dtype"]], device="meta"
                )
                for name in self._file.keys()
            }
        except (SafetensorError, ValueError, RuntimeError, TypeError, LookupError) as error:
            raise DamagedFileError(path, printable(str(error))) from error

    def read(self, name: str, place: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, on the CPU: a slice of each dimension."""
        return self._file.get_slice(name)[place] if place else self._file.get_tensor(name)


def tensor_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: its header, then each tensor's data.

    Tensors are checked when this is called, before the first byte.
    """
    for name, tensor in tensors.items():
        _check(name, tensor)
    # The widest first, so that each begins at a multiple of its width; as safetensors does.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = _header({name: tensors[name] for name in order}, metadata or {})
    return _stream(header, [tensors[name] for name in order])


def _check(name: str, tensor: Tensor) -> None:
    if name == _METADATA:
        raise ValueError(f"a tensor cannot be named {_METADATA!r} in a safetensors file: rename it")
    if tensor.dtype not in _NAMES or tensor.layout != torch.strided or tensor.is_meta:
        kind = f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
        raise ValueError(
            f"tensor {printable(name)!r} is {kind}: safetensors stores dense tensors of "
            "torch's common dtypes that have data; convert it first"
        )


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = dump_json(entries).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ValueError(
            f"{len(tensors):,} tensors need a header of {len(text):,} bytes, more than"
            f" the {_MAX_HEADER:,} of a safetensors file: save them in several files"
        )
    return len(text).to_bytes(8, "little") + text


def _stream(header: bytes, tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        row = plain.as_strided((plain.numel(),), (1,))  # one element may have any stride
        yield row.view(torch.uint8).numpy().data
