"""Checkpoints of several processes: any number of them loads what any other number saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import checkpoint_runs as runs
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
        for one, (loaded, said, extra) in enumerate(found):
            assert_same(loaded, saved[one if count == size else 0])  # each has buffers of its own
            assert extra == {"epoch": 3}
            assert len(said) == (count != size and one == 0), said  # of random states


@pytest.mark.parametrize("other_forms", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_loaded_run_goes_on_bit_by_bit(
    kind: str, other_forms: bool, processes: Pools, tmp_path: Path
) -> None:
    whole = processes(2)(whole_run, kind, tmp_path / "half")
    found = processes(2)(second_half, kind, tmp_path / "half", other_forms)
    for one, other in zip(whole, found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_schedule_goes_on_from_every_phase_in_any_number_of_processes(
    kind: str, processes: Pools, tmp_path: Path
) -> None:
    whole = processes(2)(runs.scheduled_run, kind, tmp_path, 0, 12)
    processes(2)(runs.scheduled_run, kind, tmp_path, 0, 3)
    processes(2)(runs.scheduled_run, kind, tmp_path, 3, 5)  # through the first change
    processes(2)(runs.scheduled_run, kind, tmp_path, 5, 10)
    for one, other in zip(
        whole, processes(2)(runs.scheduled_run, kind, tmp_path, 10, 12), strict=True
    ):
        assert_same(one, other)
    processes(4)(runs.scheduled_run, "fsdp", tmp_path, 3, 6)
    found = runs.scheduled_run("plain", tmp_path, 6, 12)
    assert found.keys() == whole[0].keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, whole[0][name], rtol=1e-3, atol=1e-5, msg=name)


def test_another_number_of_processes_is_told_who_gets_which_random_states(
    processes: Pools, tmp_path: Path
) -> None:
    processes(2)(train_and_save, "ddp", tmp_path / "two")
    train_and_save("plain", tmp_path / "one")
    (_, said, _), (_, nothing, _) = processes(2)(load_and_tell, "ddp", tmp_path / "one")
    assert (
        "one process wrote the checkpoint that 2 load: process 0 gets the random states" in said[0]
    )
    assert nothing == []
    assert "2 processes wrote" in load_and_tell("plain", tmp_path / "two")[1][0]


def test_gradients_that_are_not_averaged_yet_are_each_one_s(
    processes: Pools, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    whole = processes(2)(runs.saved_within_an_accumulation, folder)
    found = processes(2)(runs.resumed_within_an_accumulation, folder)
    for one, other in zip(whole, found, strict=True):
        assert_same(one, other)
    own = processes(2)(runs.gradients_loaded, "ddp", folder)
    mean = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
    assert not all(torch.equal(own[0][name], own[1][name]) for name in own[0])
    assert_same(runs.gradients_loaded("plain", folder), mean)
    for found in processes(2)(runs.gradients_loaded, "fsdp", folder):
        assert_same(found, mean)


def test_gradients_that_fsdp2_has_not_reduced_are_not_lost(processes: Pools) -> None:
    for text in processes(2)(runs.save_unreduced):
        assert text.startswith("ValueError: gradients are not reduced over the processes yet")


def test_processes_that_save_into_different_folders_are_told(
    processes: Pools, tmp_path: Path
) -> None:
    for text in processes(2)(runs.save_elsewhere, tmp_path):
        assert text.startswith("DisagreementError: the processes differ in the checkpoint to save")
        assert str(tmp_path / "0") in text and str(tmp_path / "1") in text
    assert list(tmp_path.iterdir()) == []


def test_processes_that_save_other_shards_are_told(processes: Pools, tmp_path: Path) -> None:
    for text in processes(2)(runs.save_optimizer_in_one, tmp_path / "last"):
        assert text.startswith(
            "DisagreementError: the processes differ in the sharded tensors to save"
        )
        assert "optimizer/" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_save_that_fails_in_one_process_fails_in_all_and_loses_nothing(
    kind: str, rank: int, processes: Pools, tmp_path: Path
) -> None:
    found = processes(2)(runs.save_on_a_full_disk, kind, tmp_path / "last", rank)
    saved = processes(2)(train_and_save, kind, tmp_path / "other")
    for one, (text, loaded) in enumerate(found):
        if one == rank:
            assert text.startswith("OSError: [Errno 28] No space left on device")
        else:
            assert text.startswith("PeerError") and f"process {rank}: OSError: [Errno 28]" in text
        assert_same(loaded, saved[one])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "other"]


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "process-00001.json", "state.json"])
def test_what_one_process_finds_damaged_changes_nothing_in_any(
    name: str, processes: Pools, tmp_path: Path
) -> None:
    processes(2)(train_and_save, "fsdp", tmp_path / "last")
    data = bytearray((tmp_path / "last" / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / "last" / name).write_bytes(data)
    for text, unchanged in processes(2)(runs.load_damaged, "fsdp", tmp_path / "last"):
        assert text.startswith("DamagedFileError") and name in text and unchanged


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_load_that_fails_in_one_process_changes_nothing_in_any(
    kind: str, processes: Pools, tmp_path: Path
) -> None:
    processes(2)(train_and_save, kind, tmp_path / "last")
    first, second = processes(2)(runs.load_into_another_optimizer, kind, tmp_path / "last")
    assert first[0].startswith("PeerError: loading the state failed in process 1: ValueError: the")
    assert second[0].startswith("ValueError: the optimizer is of the class SGD")
    assert first[1] and second[1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_checkpoints_of_a_run_are_written_in_the_background_by_all(
    kind: str, processes: Pools, tmp_path: Path
) -> None:
    assert processes(2)(runs.steps_saved, kind, tmp_path) == [([4, 5], 5)] * 2
    good = processes(2)(runs.newest, kind, tmp_path)
    assert [step for step, _, _ in good] == [5, 5]
    path = next(iter((tmp_path / "step-00000005").glob("process-00001.safetensors")))
    path.write_bytes(path.read_bytes()[:-1])
    first, second = processes(2)(runs.newest, kind, tmp_path)
    assert (first[0], second[0]) == (4, 4)
    assert "the checkpoint of step 5 is damaged and not used" in first[2][0] and second[2] == []
    assert (tmp_path / "step-00000005.damaged").is_dir()


def test_a_checkpoint_that_one_process_cannot_write_is_missed_by_all(
    processes: Pools, tmp_path: Path
) -> None:
    first, second = processes(2)(runs.steps_on_a_full_disk, tmp_path)
    assert "step 1 was not written (ENOSPC, No space left on device)" in first[0][0]
    assert second[0] == [] and first[1:] == second[1:] == ([0, 2], 2)
