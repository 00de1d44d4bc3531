from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from faults import at_calls, count_calls, failing, in_child, killing, wait_for

from dynarank.files import atomic, volume
from dynarank.files.atomic import replacing, write_bytes, write_chunks, write_text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_text(tmp_path / "a.txt", "old")
    return tmp_path / "a.txt"


def test_a_block_that_fails_changes_nothing(path: Path) -> None:
    with pytest.raises(KeyError), replacing(path) as beside:
        beside.write_text("half")
        raise KeyError
    with pytest.raises(KeyboardInterrupt), replacing(path):
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(path.parent) == ["a.txt"]


def test_text_is_written_as_it_is(path: Path) -> None:
    write_text(path, "é\r\n\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n\n"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_bytes() == b"\xc3\xa9\r\n\n"


def test_an_error_at_any_call_keeps_the_old_file(path: Path) -> None:
    calls = count_calls(lambda: write_text(path, "new"))
    for at in range(1, len(calls) + 1):
        for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS):
            path.write_text("old")
            try:
                with at_calls(failing(lambda n, _, at=at: n == at, number)):
                    write_text(path, "new")
            except OSError as error:
                assert error.errno == number
            else:
                assert path.read_text() == "new"
            assert path.read_text() in ("old", "new")
            for left in path.parent.glob(".*.tmp"):
                left.unlink()  # where its removal was what failed


def test_killed_at_any_call(path: Path) -> None:
    calls = count_calls(lambda: write_bytes(path, b"new" * 1000))
    for at in range(1, len(calls) + 1):
        path.write_text("old")

        def run(_: int, at: int = at) -> None:
            with at_calls(killing(at)):
                write_bytes(path, b"new" * 1000)

        assert wait_for(*in_child(run))[0] < 0
        assert path.read_text() in ("old", "new" * 1000)
        atomic.remove_orphans(path.parent)
        assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_mode_is_kept(path: Path, mode: int) -> None:
    path.chmod(mode)
    with replacing(path) as beside:
        beside.unlink()  # as writers do that rename by themselves
        beside.write_text("new")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "ours", "")
        (tmp_path / "others").write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "others").stat().st_mode


def test_a_link_is_followed_and_stays(path: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "folder" / "link"
    link.symlink_to("../a.txt")
    write_text(link, "new")
    assert link.is_symlink() and path.read_text() == "new"
    assert os.listdir(tmp_path / "folder") == ["link"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("folder", "pipe", "null"):
        with pytest.raises(ValueError, match="give the name of a file"):
            write_text(tmp_path / name, "new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "a.txt", "new")


def test_a_read_only_file_is_not_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_long_names(tmp_path: Path) -> None:
    for name in ("n" * 255, "漢" * 85, "a\nb"):
        write_text(tmp_path / name, "new")
    assert len(os.listdir(tmp_path)) == 3


def test_a_short_write_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    data = bytes(range(256)) * 3
    found = write_chunks(path, [data[:100], memoryview(data)[100:], b""])
    assert path.read_bytes() == data
    assert found == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_volume_that_lacks_a_promise_says_so_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(volume, "_said", set())
    with at_calls(failing(lambda _, call: call == name, errno.ENOSYS)):
        with pytest.warns(UserWarning, match="rename" if name == "replace" else "fsync") as caught:
            write_text(path, "new")
            write_text(path, "newer")
    assert len(caught) == 1
    assert path.read_text() == "newer" and os.listdir(path.parent) == ["a.txt"]
