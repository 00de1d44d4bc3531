from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults import in_child, wait_for

from dynarank.files import volume
from dynarank.files.atomic import HOST
from dynarank.files.ownership import FolderInUseError, move_aside, new_folder, owned

OWN = """
import sys, time
{before}
from pathlib import Path
from dynarank.files.ownership import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(60)
"""
NO_LOCKS = """
import errno, fcntl, warnings
warnings.simplefilter("ignore")
def flock(*a): raise OSError(errno.ENOLCK, "no locks")
fcntl.flock = flock
"""


@pytest.fixture(params=["locks", "no locks"])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """On an ordinary volume, and on one without locks, as some network mounts are."""
    if request.param == "locks":
        yield ""
        return
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr("dynarank.files.ownership.missing", lambda *_: None)
    yield NO_LOCKS


def owner(folder: Path, before: str) -> subprocess.Popen[str]:
    code = OWN.format(before=before)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    return process


def free(folder: Path) -> bool:
    try:
        with owned(folder):
            return True
    except FolderInUseError:
        return False


def test_the_second_process_is_refused_until_the_first_ends(tmp_path: Path, before: str) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with owner(tmp_path, before) as process:
            with pytest.raises(FolderInUseError) as caught:
                owned(tmp_path).__enter__()
            text = str(caught.value)
            assert f"process {process.pid} on {HOST} since 20" in text and "another folder" in text
            process.send_signal(number)
            process.wait()
        assert free(tmp_path)
    assert os.listdir(tmp_path) == []


def test_one_process_owns_a_folder_once(tmp_path: Path, before: str) -> None:
    with owned(tmp_path):
        assert not free(tmp_path)
        assert not free(tmp_path / ".." / tmp_path.name)
        with owned(tmp_path / "another"):
            pass
    assert free(tmp_path)
    with pytest.raises(KeyError), owned(tmp_path):
        raise KeyError
    assert free(tmp_path)


def test_a_forked_child_neither_keeps_nor_ends_it(tmp_path: Path, before: str) -> None:
    """As workers of a DataLoader are: the lock is the parent's, whoever lives longer."""
    with ExitStack() as stack:
        stack.enter_context(owned(tmp_path))

        def leave(say: int) -> None:
            stack.close()  # a child that runs to the end of the block
            os.write(say, b"left")

        assert wait_for(*in_child(leave)) == (0, b"left")
        assert not free(tmp_path)

    code = OWN.format(before=before).replace(
        'print("owned", flush=True)',
        "import os\n    child = os.fork()\n    if child: print(child, flush=True)",
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert not free(tmp_path)
        process.kill()
        process.stdout.close()
        process.wait()
        os.kill(child, 0)
        deadline = time.monotonic() + 30  # on a busy machine the child has hardly begun
        while not (ended := free(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ended
        os.kill(child, signal.SIGKILL)


def test_one_of_many_at_once_owns_it(tmp_path: Path, before: str) -> None:
    got: list[bool] = []
    barrier, done = threading.Barrier(8), threading.Barrier(8)

    def run() -> None:
        barrier.wait()
        try:
            with owned(tmp_path):
                got.append(True)
                done.wait()
        except FolderInUseError:
            done.wait()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [True] and free(tmp_path)


def test_owners_in_turn_never_overlap(tmp_path: Path) -> None:
    """Taking and releasing at full speed: the file that is the lock comes and goes."""

    def run(say: int) -> None:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            try:
                with owned(tmp_path):
                    os.mkdir(tmp_path / "inside")  # fails if another is inside
                    os.rmdir(tmp_path / "inside")
                    os.write(say, b".")
            except FolderInUseError:
                pass

    children = [in_child(run) for _ in range(3)]
    results = [wait_for(*child) for child in children]
    assert all(status == 0 for status, _ in results)
    assert sum(len(said) for _, said in results) > 20


def test_without_locks_what_cannot_be_judged_stays_owned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(volume, "_said", set())
    path = tmp_path / ".owner"
    with pytest.warns(UserWarning, match="has no file locks"), owned(tmp_path):
        assert path.exists()
    for text in ('{"pid": 1, "host": "elsewhere", "since": "2026", "token": ""}', "", "[]", "\0"):
        path.write_text(text)
        with pytest.raises(FolderInUseError, match=r"if it is gone, delete .*\.owner"):
            owned(tmp_path).__enter__()
        path.unlink()


def test_a_folder_that_was_moved_while_it_was_owned(tmp_path: Path, before: str) -> None:
    folder = tmp_path / "run"
    with owned(folder):
        aside = move_aside(folder)
        with owned(folder):
            pass
        assert not free(aside)
    assert free(aside) and free(folder)


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    orphan = tmp_path / f".report.html.{HOST}.{2**22 + 1}.0123abcd.tmp"
    orphan.write_text("half")
    (tmp_path / "report.html").write_text("old")
    with owned(tmp_path):
        assert not orphan.exists() and (tmp_path / "report.html").read_text() == "old"


def test_new_folders_are_new(tmp_path: Path) -> None:
    names: list[str] = []
    threads = [
        threading.Thread(target=lambda: names.append(new_folder(tmp_path / "runs", "digits").name))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == ["digits", *(f"digits-{n}" for n in range(2, 9))]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
def test_moving_aside_overwrites_nothing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "target").write_text("target")
    seen = []
    for number in range(3):
        path = tmp_path / "run"
        if kind == "file":
            path.write_text(str(number))
        elif kind == "folder":
            path.mkdir()
            (path / "file").write_text(str(number))
        else:
            path.symlink_to(tmp_path / ("target" if kind == "link" else "nowhere"))
        seen.append(move_aside(path))
        assert not os.path.lexists(path)
    assert [path.name for path in seen] == ["run.aside", "run.aside-2", "run.aside-3"]
    for number, path in enumerate(seen):
        if kind in ("file", "folder"):
            assert (path if kind == "file" else path / "file").read_text() == str(number)
        else:
            assert path.is_symlink()
    assert (tmp_path / "target").read_text() == "target"
    with pytest.raises(FileNotFoundError):
        move_aside(tmp_path / "nothing")
    assert not (tmp_path / "nothing.aside").exists()
