"""Errors of the volume at every call: nothing that was there is lost, and the run goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from faults import (
    FULL,
    at_calls,
    contents,
    count_calls,
    equal,
    failing,
    in_child,
    litter,
    tree,
    wait_for,
)

from dynarank.checkpoint.folder import Contents, read_folder, write_folder
from dynarank.checkpoint.steps import Checkpoints

ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS]


def saved(folder: Path, said: list[str]) -> Checkpoints:
    """Two checkpoints, so that the next save removes one."""
    checkpoints = Checkpoints(folder, background=False, warn=said.append)
    for step in (1, 2):
        checkpoints.save(step, contents(step))
    return checkpoints


@pytest.mark.slow
def test_an_error_at_any_call_loses_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    calls = count_calls(lambda: saved(tmp_path / "whole", said).save(3, contents(3)))
    for at in range(len(calls) // 3, len(calls) + 1):
        for number in ERRORS if FULL else [ERRORS[at % 4]]:
            folder = tmp_path / f"{at}-{number}"
            said.clear()
            checkpoints = saved(folder, said)
            with at_calls(failing(lambda n, _, at=at: n == at, number)):
                checkpoints.save(3, contents(3))
            found = checkpoints.newest()
            assert found is not None and equal(found[1], contents(found[0]))
            assert found[0] >= (checkpoints.last_acknowledged or 0) >= 2
            assert equal(read_folder(folder / "step-00000002"), contents(2))
            if checkpoints.last_acknowledged == 2:
                assert errno.errorcode[number] in said[0] and "is kept" in said[0]
                assert len(said) == 1
            checkpoints = Checkpoints(folder, background=False, warn=said.append)
            checkpoints.save(4, contents(4))
            assert litter(folder) == []
            assert equal(read_folder(folder / "step-00000004"), contents(4))
            shutil.rmtree(folder)


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_stays_full(tmp_path: Path, number: int, background: bool) -> None:
    said: list[str] = []
    checkpoints = saved(tmp_path, said)
    before = tree(tmp_path)
    with at_calls(failing(lambda _, name: name == "write", number)):
        for step in range(3, 13):
            checkpoints.save(step, contents(step))
            checkpoints.drain()
            assert tree(tmp_path) == before and litter(tmp_path) == []
    assert len(said) == 4, "the failures 1, 2, 4 and 8"
    assert all(errno.errorcode[number] in text for text in said)
    assert "step 3 " in said[0] and "step-00000002 is kept" in said[0] and "goes on" in said[0]
    checkpoints.save(13, contents(13))
    checkpoints.close()
    assert checkpoints.last_acknowledged == 13 and len(said) == 4


def test_free_space_is_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    checkpoints = saved(tmp_path, said)
    size = Contents({"m": {"w": torch.zeros(1000)}})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4799))
    calls = count_calls(lambda: checkpoints.save(3, size))
    assert "write" not in calls and "mkdir" in calls
    assert len(said) == 1 and "ENOSPC" in said[0] and "4,000 bytes, 4,799 are free" in said[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4800))
    checkpoints.save(4, size)
    assert checkpoints.last_acknowledged == 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=0, free=0))
    checkpoints.save(5, size)  # a volume that reports no size
    assert checkpoints.last_acknowledged == 5


def test_a_limit_of_the_system_on_file_sizes(tmp_path: Path) -> None:
    """A real short write and a real error, not ones of a test."""

    def run(say: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        said: list[str] = []
        checkpoints = Checkpoints(tmp_path, warn=said.append)
        checkpoints.save(1, contents(1), wait=True)
        checkpoints.save(2, contents(2, size=50_000), wait=True)
        os.write(say, said[0].encode())

    status, said = wait_for(*in_child(run))
    assert status == 0 and b"EFBIG" in said and b"step-00000001 is kept" in said
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_an_error_while_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    write_folder(tmp_path / "whole", contents(1))
    calls = count_calls(lambda: write_folder(tmp_path / "whole", contents(2)))
    for at in range(1, len(calls) + 1):
        folder = tmp_path / str(at) / "checkpoint"
        write_folder(folder, contents(1))
        try:
            with at_calls(failing(lambda n, _, at=at: n == at, errno.EIO)):
                write_folder(folder, contents(2))
        except OSError as error:
            assert error.errno == errno.EIO
        found = read_folder(folder)
        assert equal(found, contents(found.data["state"]["step"]))
        write_folder(folder, contents(2))
        assert equal(read_folder(folder), contents(2)) and litter(folder.parent) == []


def test_what_is_no_error_of_the_volume_is_raised_by_the_next_call(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, Contents(data={"state": object()}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(2, contents(2))
    checkpoints.save(2, contents(2))
    checkpoints.close()
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(3, Contents(data={"state": object()}), wait=True)
    assert os.listdir(tmp_path) == ["step-00000002"]
