"""A safetensors file, tensor by tensor: nothing is in memory but the tensor that is asked for.

The format: 8 bytes, the little-endian length of a JSON header; the header, which gives each
tensor's dtype, shape and place; the data. The library's reader maps the whole file into memory,
where every page that was read stays counted; this one reads, so that a file may be larger than the
memory.

Reference: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["StoredTensor", "TensorFile"]

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
    """A tensor in a file.

    Args:
        shape: its shape.
        dtype: its dtype; None if it is not one of floating-point numbers.
        start: where its bytes begin in the file.
        stop: where they end.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    start: int
    stop: int


class TensorFile:
    """The tensors of a safetensors file, in the order in which they lie there.

    Args:
        path: the file. Its header is read and checked against its size at once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        self.path = path
        try:
            self.tensors = _read_header(path)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error

    def read(self, name: str) -> Tensor:
        """The tensor of this name, in memory of its own; 8-bit numbers come in fp32.

        Raises:
            ValueError: the file has become shorter since it was opened.
        """
        stored = self.tensors[name]
        assert stored.dtype is not None, name
        if stored.start == stored.stop:
            return torch.empty(stored.shape, dtype=stored.dtype)
        data = bytearray(stored.stop - stored.start)
        with self.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            view, done = memoryview(data), 0
            while done < len(data):  # one call reads at most 2 GiB
                if not (count := file.readinto(view[done:])):
                    raise ValueError(f"{self.path} is not a whole safetensors file: it ends early")
                done += count
        tensor = torch.frombuffer(data, dtype=stored.dtype).reshape(stored.shape)
        return tensor.float() if stored.dtype.itemsize == 1 else tensor


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header should have {length} bytes, the file has {size}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    begin = 8 + length
    tensors = {name: _stored(name, entry, begin) for name, entry in header.items()}
    end = max((stored.stop for stored in tensors.values()), default=begin)
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file has {size}")
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def _stored(name: str, entry: Mapping[str, Any], begin: int) -> StoredTensor:
    shape, (start, stop) = tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
    dtype = _FLOATS.get(entry["dtype"])
    wrong = dtype is not None and stop - start != math.prod(shape) * dtype.itemsize
    if wrong or not 0 <= start <= stop:
        raise ValueError(f"tensor {name!r} of shape {shape} does not fit bytes {start} to {stop}")
    return StoredTensor(shape, dtype, begin + start, begin + stop)
