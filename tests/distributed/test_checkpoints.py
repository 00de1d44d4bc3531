"""Checkpoints of several processes: any number of them loads what any other number saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import load_and_tell, second_half, train_and_save, whole_run
from process_pool import Pools
from torch import Tensor

WRITERS = [("plain", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4)]
READERS = [("plain", 1), ("plain", 2), ("ddp", 2), ("fsdp", 2), ("fsdp", 4)]


def run(processes: Pools, size: int, function: Any, *args: Any) -> list[Any]:
    return [function(*args)] if size == 1 else processes(size)(function, *args)


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("writer", WRITERS, ids=str)
def test_any_number_of_processes_loads_what_any_other_saved(
    writer: tuple[str, int], processes: Pools, tmp_path: Path
) -> None:
    kind, size = writer
    saved = run(processes, size, train_and_save, kind, tmp_path / "last", {"epoch": 3})
    for kind, count in READERS:
        found = run(processes, count, load_and_tell, kind, tmp_path / "last")
        for one, (loaded, _, extra) in enumerate(found):
            assert_same(loaded, saved[one if count == size else 0])  # each has buffers of its own
            assert extra == {"epoch": 3}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_loaded_run_goes_on_bit_by_bit(kind: str, processes: Pools, tmp_path: Path) -> None:
    whole = processes(2)(whole_run, kind, tmp_path / "half")
    for one, other in zip(whole, processes(2)(second_half, kind, tmp_path / "half"), strict=True):
        assert_same(one, other)
