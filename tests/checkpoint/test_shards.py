"""Files of pieces of tensors: put together whole or in part, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank.checkpoint.folder import Contents, put, read_folder, write_files
from dynarank.checkpoint.manifest import Entry
from dynarank.checkpoint.shards import Shard, Stored, shard_chunks, shard_file
from dynarank.files.atomic import write_chunks
from dynarank.files.reading import DamagedFileError

WHOLE: dict[str, Tensor] = {
    "model/weight": torch.arange(35, dtype=torch.bfloat16).view(7, 5),
    "optimizer/mean": torch.arange(12.0).view(3, 4),
}


def pieces(name: str, begin: int, end: int, dim: int = 0) -> Shard:
    whole = WHOLE[name]
    offsets = torch.Size(begin if d == dim else 0 for d in range(whole.ndim))
    return Shard(whole.narrow(dim, begin, end - begin), whole.shape, offsets)


def write(folder: Path, *files: dict[str, Shard]) -> None:
    """A checkpoint of as many processes, with a scalar that all have."""
    beside = folder.with_name("beside")
    beside.mkdir()
    entries = write_files(beside, Contents({"model": {"steps": torch.tensor(3)}}, {"state": 1}))
    for rank, shards in enumerate(files):
        name = shard_file(rank)
        entries[name] = Entry(*write_chunks(beside / name, shard_chunks(shards)))
    put(beside, folder, entries)


def test_pieces_make_the_whole(tmp_path: Path) -> None:
    first = {
        "model/weight": pieces("model/weight", 0, 4),
        "optimizer/mean": pieces("optimizer/mean", 0, 3, dim=1),
    }
    second = {"optimizer/mean": pieces("optimizer/mean", 3, 4, dim=1)}
    write(tmp_path / "a", first, second, {"model/weight": pieces("model/weight", 4, 7)})
    found = read_folder(tmp_path / "a")
    assert torch.equal(found.tensors["model"]["weight"], WHOLE["model/weight"])
    assert torch.equal(found.tensors["optimizer"]["mean"], WHOLE["optimizer/mean"])
    assert found.tensors["model"]["steps"] == 3 and found.data == {"state": 1}
    stored = Stored(tmp_path / "a", [shard_file(0), shard_file(2), shard_file(1)])
    assert {t.device.type for t in stored.outline("model").values()} == {"meta"}


@pytest.mark.parametrize(
    "offsets",
    [[5, 0], [-1, 0], [3, 0], [4], [4, 0, 0], [10**12, 0], ["4", 0], [None, 0], [4.5, 0]],
    ids=str,
)
def test_pieces_that_do_not_make_a_whole_are_damage(offsets: Any, tmp_path: Path) -> None:
    shard = pieces("model/weight", 4, 7)
    second = {"model/weight": Shard(shard.local, shard.shape, offsets)}
    write(tmp_path / "a", {"model/weight": pieces("model/weight", 0, 4)}, second)
    with pytest.raises(DamagedFileError):
        read_folder(tmp_path / "a")
