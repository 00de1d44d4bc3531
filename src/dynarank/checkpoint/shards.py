"""Sharded tensors (FSDP2's): each process writes its own pieces, and reads those it needs.

Who writes which piece is planned by ``torch.distributed.checkpoint`` (DCP), and so is which saved
pieces a new one is put together from: any number of processes loads what another number saved. A
file of pieces is safetensors; their places are in its header, in the entry that DCP reads too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynarank.files.json_data import parse_json
from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError
from dynarank.files.tensors import TensorFile, tensor_chunks

__all__ = [
    "Shard",
    "Stored",
    "is_shard_file",
    "piece_like",
    "shard_chunks",
    "shard_file",
    "shard_of",
]

_FILE = re.compile(r"shard-\d{5,}\.safetensors", re.ASCII)
_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


@dataclass(frozen=True)
class Shard:
    """A piece of a tensor, on the CPU.

    Args:
        local: its values.
        shape: of the whole tensor.
        offsets: where the piece begins in it.
    """

    local: Tensor
    shape: torch.Size
    offsets: torch.Size


def shard_file(rank: int) -> str:
    """The name of the file of a process's pieces."""
    return f"shard-{rank:05d}.safetensors"


def is_shard_file(name: str) -> bool:
    """Whether this is the name of a file of pieces."""
    return _FILE.fullmatch(name) is not None


def shard_of(tensor: Any) -> Shard:
    """A copy of this process's piece of a sharded tensor."""
    (chunk,) = tensor.__create_chunk_list__()
    return Shard(tensor.detach().to_local().to("cpu", copy=True), tensor.shape, chunk.offsets)


def piece_like(tensor: Tensor, like: Any) -> Tensor:
    """This process's piece of a tensor which all have, sharded as ``like`` is; None: all of it."""
    if like is None:
        return tensor
    (chunk,) = like.__create_chunk_list__()
    return _as_shard(tensor[_slices(chunk.offsets, chunk.sizes)], like)


def shard_chunks(shards: Mapping[str, Shard]) -> Iterator[bytes | memoryview]:
    """The bytes of a file of pieces."""
    places = {name: {_OFFSETS: list(shard.offsets)} for name, shard in shards.items()}
    tensors = {name: shard.local for name, shard in shards.items()}
    return tensor_chunks(tensors, {_PLACES: json.dumps(places)})


@dataclass(frozen=True)
class _Piece:
    """A piece in a file."""

    file: TensorFile
    key: str
    offsets: torch.Size
    sizes: torch.Size


class Stored:
    """The tensors of a checkpoint, each read when it is asked for, whole or a piece.

    Args:
        folder: of the checkpoint, whose files have been verified. They are kept open.
        names: of its safetensors files.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._pieces: dict[str, list[_Piece]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for name in names:
            self._open(folder / name)
        for name, pieces in self._pieces.items():
            held, whole = sum(piece.sizes.numel() for piece in pieces), self._shape(name).numel()
            if held != whole:
                problem = f"its pieces of {printable(name)} have {held:,} of {whole:,} entries"
                raise DamagedFileError(folder, problem, "use another checkpoint")

    def parts(self) -> set[str]:
        """The parts of the checkpoint that have tensors."""
        return {name.partition("/")[0] for name in self._pieces}

    def names(self, part: str) -> Iterator[str]:
        """The names of the tensors of a part."""
        return (n.removeprefix(f"{part}/") for n in self._pieces if n.startswith(f"{part}/"))

    def outline(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part without their values."""
        found = {name: f"{part}/{name}" for name in self.names(part)}
        return {
            name: torch.empty(self._shape(full), dtype=self._dtypes[full], device="meta")
            for name, full in found.items()
        }

    def read(self, part: str, likes: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of a part, on the CPU; of those like a sharded one, this process's pieces.

        ``likes``: sharded tensors, by ``<name of the part>/<name of the tensor>``.
        """
        found = {name: f"{part}/{name}" for name in self.names(part)}
        return {name: self._read(full, (likes or {}).get(full)) for name, full in found.items()}

    def _open(self, path: Path) -> None:
        file, places = TensorFile(path), dict[str, Any]()
        try:
            if is_shard_file(path.name):
                places = parse_json(file.metadata[_PLACES], f"the places in {path}")
            for key, outline in file.outlines.items():
                name = key if places else f"{path.stem}/{key}"
                offsets = torch.Size(places[key][_OFFSETS] if places else [0] * outline.ndim)
                if len(offsets) != outline.ndim or min(offsets, default=0) < 0:
                    raise ValueError(f"its piece of {name} begins at {tuple(offsets)}")
                before = self._pieces.setdefault(name, [])
                if before and len(before[0].offsets) != outline.ndim:
                    raise ValueError(f"its piece of {name} has {outline.ndim} dimensions")
                before.append(_Piece(file, key, offsets, outline.shape))
                self._dtypes[name] = outline.dtype
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise DamagedFileError(path, printable(str(error))) from error

    def _shape(self, name: str) -> torch.Size:
        ends = [
            [begin + size for begin, size in zip(piece.offsets, piece.sizes, strict=True)]
            for piece in self._pieces[name]
        ]
        return torch.Size([max(row) for row in zip(*ends, strict=True)])

    def _read(self, name: str, like: Any) -> Tensor:
        if like is None:
            whole = torch.zeros(self._shape(name), dtype=self._dtypes[name], device="cpu")
            self._fill(name, whole, torch.Size([0] * whole.ndim))
            return whole
        (chunk,) = like.__create_chunk_list__()
        local = torch.zeros(chunk.sizes, dtype=self._dtypes[name], device="cpu")
        self._fill(name, local, chunk.offsets)
        return _as_shard(local, like)

    def _fill(self, name: str, local: Tensor, offsets: torch.Size) -> None:
        """Put a piece together from those that were saved."""
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
        )
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        pieces = self._pieces[name]
        saved = [ChunkStorageMetadata(piece.offsets, piece.sizes) for piece in pieces]
        whole = TensorStorageMetadata(TensorProperties(local.dtype), local.shape, saved)
        wanted = [ChunkStorageMetadata(offsets, local.shape)]
        for item in create_read_items_for_chunk_list(name, whole, wanted):
            piece = pieces[item.storage_index.index or 0]
            found = piece.file.read(piece.key, _slices(item.storage_offsets, item.lengths))
            local[_slices(item.dest_offsets, item.lengths)].copy_(found)


def _as_shard(local: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=torch.empty(like.shape, device="meta").stride(),
    )


def _slices(offsets: Iterable[int], lengths: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(offsets, lengths, strict=True))
