"""How ``torch.distributed.checkpoint`` (DCP) writes pieces of tensors into our files.

DCP plans who writes which piece and tells each error to all processes. Its own writers are not
used: they pickle, or hold a file in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter
from torch.futures import Future

from dynarank.checkpoint.manifest import Entry
from dynarank.checkpoint.shards import Shard, shard_chunks
from dynarank.distributed.processes import PeerError, Processes
from dynarank.files.atomic import write_chunks

__all__ = ["write_shards"]


def write_shards(
    path: Path, shards: Mapping[str, Shard], processes: Processes, *, sync: bool = True
) -> dict[str, Entry]:
    """Write the pieces of all processes, each piece once: all of them, or all fail.

    Args:
        path: the file for the pieces of this process.
        shards: its pieces, by the name of the tensor.
        processes: all that have pieces.
        sync: wait until they are on the device.

    Returns:
        The file, if there was anything to write.

    Raises:
        Exception: what failed here.
        PeerError: it failed in another process only.
    """
    writer = _Writer(path, sync)
    try:
        save(
            dict(shards),
            storage_writer=writer,
            planner=_Planner(flatten_state_dict=False),
            process_group=processes.control,
        )
    except CheckpointException as failed:
        told = {rank: error for rank, (error, _) in failed.failures.items()}
        if (own := told.get(processes.rank)) is not None:
            raise own from None
        rank, error = min(told.items())
        raise PeerError(
            f"writing shards failed in process {rank}: {type(error).__name__}: {error}"
        ) from None
    return writer.written


class _Planner(DefaultSavePlanner):
    """Plans pieces that are copies, and no DTensors any more."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.is_coordinator = state_dict, is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(*one) for one in self.state_dict.items() if _has_values(*one)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn]


class _Writer(StorageWriter):
    """Writes the pieces of a process into one file, hashed on the way."""

    def __init__(self, path: Path, sync: bool) -> None:
        self._path, self._sync = path, sync
        self.written: dict[str, Entry] = {}

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[Any]]:
        shards = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        if shards:
            entry = Entry(*write_chunks(self._path, shard_chunks(shards), sync=self._sync))
            self.written[self._path.name] = entry
        done: Future[list[Any]] = Future()
        done.set_result([])
        return done

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **kwargs: Any) -> None: ...

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def finish(self, metadata: Any, results: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _has_values(_: str, shard: Shard) -> bool:
    return shard.local.numel() > 0  # else other processes have all of it


def _item(name: str, shard: Shard) -> WriteItem:
    place = ChunkStorageMetadata(shard.offsets, shard.local.shape)
    kind = TensorProperties.create_from_tensor(shard.local)
    data = TensorWriteData(place, kind, shard.shape)
    return WriteItem(MetadataIndex(name, shard.offsets), WriteItemType.SHARD, tensor_data=data)
