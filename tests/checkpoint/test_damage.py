"""Whatever happens to a checkpoint's files is detected, and named; nothing in them is executed."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import contents, equal, seal, tree, trials

from dynarank.checkpoint.folder import Contents, read_folder, verify_folder, write_folder
from dynarank.checkpoint.manifest import MANIFEST
from dynarank.checkpoint.steps import Checkpoints
from dynarank.files.reading import DamagedFileError

FILES = ["MANIFEST.json", "events.json", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "checkpoint", contents(3))
    assert sorted(os.listdir(tmp_path / "checkpoint")) == FILES
    return tmp_path / "checkpoint"


def refused(folder: Path, name: str) -> None:
    with pytest.raises(DamagedFileError, match="cannot be read") as caught:
        read_folder(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_every_flip_is_detected_and_named(folder: Path, name: str) -> None:
    draw = random.Random(name)
    path, whole = folder / name, (folder / name).read_bytes()
    for _ in range(trials(60, 600)):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= draw.choice([1 << draw.randrange(8), 32, 255])
        path.write_bytes(flipped)
        refused(folder, name)
    path.write_bytes(whole)
    assert equal(read_folder(folder), contents(3))


@pytest.mark.parametrize("name", FILES)
def test_every_cut_and_addition_is_detected_and_named(folder: Path, name: str) -> None:
    draw = random.Random(name)
    path, whole = folder / name, (folder / name).read_bytes()
    for _ in range(trials(20, 100)):
        path.write_bytes(whole[: draw.randrange(len(whole))])
        refused(folder, name)
        with pytest.raises(DamagedFileError):
            read_folder(folder, "size")
    for more in (b"\0", b"\n", b" ", whole):
        path.write_bytes(whole + more)
        refused(folder, name)


def missing(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_inside(path: Path) -> None:
    path.rename(path.with_name(".nfs1"))
    path.symlink_to(".nfs1")


def link_outside(path: Path) -> None:
    outside = path.parent.parent / path.name
    path.rename(outside)
    path.symlink_to(outside)


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def of_another_step(path: Path) -> None:
    write_folder(path.parent.parent / "other", contents(4))
    shutil.copy(path.parent.parent / "other" / path.name, path)


@pytest.mark.parametrize(
    "damage",
    [missing, a_folder, link_inside, link_outside, dangling_link, pipe, device, of_another_step],
)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_this_checkpoint_is_refused(
    folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(folder / name)
    if (name, damage) == (MANIFEST, of_another_step):
        name = "model.safetensors"  # the first that does not fit the other manifest
    refused(folder, name)


@pytest.mark.parametrize("name", ["more.json", "model2.safetensors", ".hidden", "a\x1b[31m\nb"])
def test_a_file_that_was_added_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    refused(folder, name.encode("unicode_escape").decode())


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", ".nfs000000000001"])
def test_what_systems_leave_in_folders_does_not_count(folder: Path, name: str) -> None:
    (folder / name).write_text("")
    assert equal(read_folder(folder), contents(3))


def test_only_sizes(folder: Path) -> None:
    path = folder / "model.safetensors"
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert not equal(read_folder(folder, verify="size"), contents(3))
    with pytest.raises(ValueError, match="'full' or 'size', not 'off'"):
        read_folder(folder, verify="off")  # type: ignore[arg-type]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_never_executed(folder: Path, name: str, zipped: bool) -> None:
    payload, path = Payload(folder.parent / "executed"), folder / name
    torch.save(payload, path) if zipped else path.write_bytes(pickle.dumps(payload))
    for sealed in (False, True):
        if sealed and name != MANIFEST:
            seal(folder)
            assert verify_folder(folder)
        refused(folder, name)
    assert not payload.path.exists()


def test_damaged_steps_are_set_aside(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=3, warn=said.append)
    for step in (1, 2, 3):
        checkpoints.save(step, contents(step), wait=True)
    (tmp_path / "step-00000003" / "events.json").write_text("[]")
    (tmp_path / "step-00000002" / MANIFEST).unlink()
    found = checkpoints.newest()
    assert found is not None and found[0] == 1 and equal(found[1], contents(1))
    assert sorted(os.listdir(tmp_path)) == [
        "step-00000001",
        "step-00000002.damaged",
        "step-00000003.damaged",
    ]
    assert len(said) == 2
    assert "step 3 is damaged" in said[0] and "events.json" in said[0] and ".damaged" in said[0]
    assert "step 2 is damaged" in said[1] and MANIFEST in said[1]
    (tmp_path / "step-00000001" / "state.json").unlink()
    for _ in range(2):  # the second time nothing but damaged ones is left: not an empty folder
        with pytest.raises(DamagedFileError, match=r"every checkpoint is damaged.*another folder"):
            checkpoints.newest()


@pytest.mark.parametrize("name", FILES)
def test_files_swapped_between_steps(tmp_path: Path, name: str) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, warn=said.append)
    for step in (1, 2):
        checkpoints.save(step, contents(step), wait=True)
    one, two = (tmp_path / f"step-0000000{step}" / name for step in (1, 2))
    one.rename(tmp_path / "kept")
    two.rename(one)
    (tmp_path / "kept").rename(two)
    with pytest.raises(DamagedFileError, match="every checkpoint is damaged"):
        checkpoints.newest()


def test_whole_steps_swapped(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, warn=said.append)
    for step in (1, 2):
        checkpoints.save(step, contents(step), wait=True)
    shutil.rmtree(tmp_path / "step-00000002")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002")
    found = checkpoints.newest()
    assert found is not None and found[0] == 1
    assert "it is the checkpoint of step 1" in said[0]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_step_that_is_no_folder(tmp_path: Path, kind: str) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "checkpoints"
    write_folder(outside, contents(5), step=5)
    before = tree(outside)
    folder.mkdir()
    for step in (5, 6):
        path = folder / f"step-0000000{step}"
        path.symlink_to(outside) if kind == "link" else path.write_text("")
    said: list[str] = []
    checkpoints = Checkpoints(folder, warn=said.append)
    checkpoints.save(5, contents(7), wait=True)
    found = checkpoints.newest()
    assert found is not None and found[0] == 5 and equal(found[1], contents(7))
    assert tree(outside) == before
    assert len(said) == 2


def test_contents_that_could_not_be_read_again_are_not_written(tmp_path: Path) -> None:
    deep: list[object] = []
    for _ in range(70):
        deep = [deep]
    for data in (deep, {1: 2}, float("nan"), 10**400, {1, 2}):
        with pytest.raises((TypeError, ValueError)):
            write_folder(tmp_path / "c", Contents(data={"state": data}))
    for name in ("../state", "/state", "State", "", "a.b", "MANIFEST", "x" * 200):
        with pytest.raises(ValueError, match="file name of a checkpoint"):
            write_folder(tmp_path / "c", Contents(data={name: 1}))
    with pytest.raises(ValueError, match="sparse"):
        write_folder(tmp_path / "c", Contents({"model": {"w": torch.eye(2).to_sparse()}}))
    assert os.listdir(tmp_path) == []
