from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from faults import at_calls, contents, count_calls, equal, failing, litter, tree
from torch import Tensor

from dynarank.checkpoint import folder as folder_module
from dynarank.checkpoint.folder import read_folder, write_folder
from dynarank.checkpoint.manifest import MANIFEST
from dynarank.files import volume
from dynarank.files.atomic import HOST
from dynarank.files.reading import DamagedFileError


def test_everything_is_on_the_device_before_it_counts(tmp_path: Path) -> None:
    """Each file and the folder before the rename, the parent after it."""
    seen: list[str] = []
    descriptors: dict[int, str] = {}

    def action(_: int, name: str, args: tuple[Any, ...]) -> None:
        if name == "fsync":
            seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}")))
        elif name == "rename":
            seen.append("rename")
        elif name == "write":
            descriptors[args[0]] = os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}"))
            seen.append(f"write {descriptors[args[0]]}")

    with at_calls(action):
        write_folder(tmp_path / "checkpoint", contents(1))
    seen = [name for at, name in enumerate(seen) if not at or name != seen[at - 1]]
    files = ["model.safetensors", "optimizer.safetensors", "state.json", "events.json", MANIFEST]
    in_files = [step for name in files for step in (f"write {name}", name)]
    assert seen[: len(in_files)] == in_files
    temporary, rename, parent = seen[len(in_files) :]
    assert temporary.startswith(".checkpoint.") and rename == "rename" and parent == tmp_path.name
    assert "fsync" not in count_calls(
        lambda: write_folder(tmp_path / "quick", contents(1), sync=False)
    )
    assert equal(read_folder(tmp_path / "quick"), contents(1))


@pytest.mark.parametrize("kind", ["foreign", "model", "mixed", "file", "other manifest"])
def test_nothing_but_a_checkpoint_is_replaced(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "work"
    if kind == "file":
        folder.write_text("mine")
    else:
        if kind == "mixed":
            write_folder(folder, contents(1))
        folder.mkdir(exist_ok=True)
        (folder / ("model.safetensors" if kind == "model" else "thesis.tex")).write_text("mine")
        if kind == "other manifest":
            (folder / MANIFEST).write_text('{"name": "another program"}')
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"is no checkpoint, or holds more than one.*nothing was"):
        write_folder(folder, contents(2))
    assert tree(tmp_path) == before


def test_an_empty_folder_and_a_checkpoint_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    for step in (1, 2):
        write_folder(tmp_path / "checkpoint", contents(step))
        assert equal(read_folder(tmp_path / "checkpoint"), contents(step))
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_damaged_one_is_kept_aside(tmp_path: Path) -> None:
    for step in (1, 2):
        write_folder(tmp_path / "checkpoint", contents(step))
        (tmp_path / "checkpoint" / MANIFEST).write_text("{}")
    write_folder(tmp_path / "checkpoint", contents(3))
    names = ["checkpoint", "checkpoint.damaged", "checkpoint.damaged-2"]
    assert sorted(os.listdir(tmp_path)) == names
    assert equal(read_folder(tmp_path / "checkpoint"), contents(3))


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "last").symlink_to("elsewhere/checkpoint")
    for step in (1, 2):
        write_folder(tmp_path / "last", contents(step))
        assert equal(read_folder(tmp_path / "last"), contents(step))
    assert (tmp_path / "last").is_symlink()
    assert os.listdir(tmp_path / "elsewhere") == ["checkpoint"]


def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "checkpoint", contents(1))
    monkeypatch.chdir(tmp_path / "checkpoint")
    assert equal(read_folder(Path(".")), contents(1))
    monkeypatch.chdir(tmp_path)
    write_folder(Path("another"), contents(2))
    assert equal(read_folder(Path("another")), contents(2))


def test_no_folder_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_folder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DamagedFileError, match=r"has no MANIFEST\.json"):
        read_folder(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(DamagedFileError, match="not a folder"):
        read_folder(tmp_path / "file")


def test_what_killed_savers_left_is_removed_by_the_next(tmp_path: Path) -> None:
    ours = tmp_path / f".checkpoint.{HOST}.{2**22 + 1}.0123abcd.tmp"
    other = tmp_path / f".another.{HOST}.{2**22 + 1}.0123abcd.tmp"
    for folder in (ours, other):
        folder.mkdir()
    write_folder(tmp_path / "checkpoint", contents(1))
    assert not ours.exists() and other.exists()


def test_a_volume_without_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written in place, the manifest last; the first to be cut is no checkpoint."""
    monkeypatch.setattr(volume, "_said", set())
    folder = tmp_path / "checkpoint"
    no_renames = failing(lambda _, name: name == "rename", errno.ENOTSUP)
    with at_calls(no_renames), pytest.warns(UserWarning, match=r"no rename.*MANIFEST.json"):
        write_folder(folder, contents(1))
    assert equal(read_folder(folder), contents(1)) and litter(tmp_path) == []
    with at_calls(no_renames), pytest.raises(OSError, match="not supported"):
        write_folder(folder, contents(2))
    assert equal(read_folder(folder), contents(1)) and litter(tmp_path) == []
    shutil.rmtree(folder)
    writes = 0

    def action(n: int, name: str, args: tuple[Any, ...]) -> None:
        nonlocal writes
        writes += name == "write"
        if name == "rename" or (name == "write" and writes == 12):  # of 16
            raise OSError(errno.ENOTSUP if name == "rename" else errno.ENOSPC, "failed")

    with at_calls(action), pytest.raises(OSError, match="failed"):
        write_folder(folder, contents(2))
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_never_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer in another process: what is read is wholly the old one, or wholly the new."""
    write_folder(tmp_path / "last", contents(1))
    plain, steps = folder_module.load_tensors, iter((2, 3))

    def replaced_first(path: Path) -> dict[str, Tensor]:
        if (step := next(steps, None)) is not None:
            write_folder(tmp_path / "last", contents(step, size=step * 9))
        return plain(path)

    monkeypatch.setattr(folder_module, "load_tensors", replaced_first)
    assert equal(read_folder(tmp_path / "last"), contents(3, size=27))
