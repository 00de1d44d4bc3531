from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from faults import contents, equal, litter

from dynarank.checkpoint import steps
from dynarank.checkpoint.folder import Contents, write_folder
from dynarank.checkpoint.steps import Checkpoints
from dynarank.checkpoint.together import write_together
from dynarank.files.reading import DamagedFileError


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.newest() is None
    assert checkpoints.last_acknowledged is None
    checkpoints.close()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int, background: bool) -> None:
    checkpoints = Checkpoints(tmp_path, keep=keep, background=background)
    for step in (5, 40, 300, 2000, 1_234_567_890):
        checkpoints.save(step, contents(min(step, 50)))
    checkpoints.close()
    last = ["step-00000300", "step-00002000", "step-1234567890"]
    assert names(tmp_path) == sorted(last[-keep:])
    found = checkpoints.newest()
    assert found is not None and found[0] == checkpoints.last_acknowledged == 1_234_567_890
    assert equal(found[1], contents(50))


def test_one_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep=1 .*at least 2"):
        Checkpoints(tmp_path, keep=1)


def test_only_verified_ones_count_as_kept(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, warn=said.append)
    checkpoints.save(1, contents(1), wait=True)
    checkpoints.save(2, contents(2), wait=True)
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    checkpoints.save(3, contents(3), wait=True)
    assert names(tmp_path) == ["step-00000001", "step-00000002.damaged", "step-00000003"]
    assert len(said) == 1 and "step 2 is damaged" in said[0]
    checkpoints.save(4, contents(4), wait=True)
    assert names(tmp_path) == ["step-00000002.damaged", "step-00000003", "step-00000004"]


def test_what_was_damaged_while_it_was_written_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, warn=said.append, background=False)
    checkpoints.save(1, contents(1))

    def write(folder: Path, *args: object, **kwargs: object) -> None:
        write_together(folder, *args, **kwargs)  # type: ignore[arg-type]
        (folder / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr(steps, "write_together", write)
    checkpoints.save(2, contents(2))
    checkpoints.save(3, contents(3))
    assert checkpoints.last_acknowledged == 1
    found = checkpoints.newest()
    assert found is not None and found[0] == 1 and len(said) == 2


def test_a_later_step_is_never_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (7, 8, 9, 3, 4):
        checkpoints.save(step, contents(step), wait=True)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (3, 4, 8, 9)]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for again in (1, 2):
        checkpoints.save(5, contents(again), wait=True)
    found = checkpoints.newest()
    assert found is not None and equal(found[1], contents(2))
    assert names(tmp_path) == ["step-00000005"]


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000001.bak").mkdir()
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, contents(step), wait=True)
    assert {"notes.txt", "step-1", "step-00000001.bak"} < set(names(tmp_path))


def test_one_save_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, written = 0, 0, list[int]()
    gate = threading.Event()

    def write(folder: Path, *args: object, step: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        gate.wait(10)
        time.sleep(0.01)
        write_together(folder, *args, step=step)  # type: ignore[arg-type]
        written.append(step)
        running -= 1

    monkeypatch.setattr(steps, "write_together", write)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, contents(1))
    assert checkpoints.last_acknowledged is None, "it does not wait for the device"
    gate.set()
    for step in (2, 3, 4):
        checkpoints.save(step, contents(step))
    checkpoints.drain()
    assert most == 1 and written == [1, 2, 3, 4] and checkpoints.last_acknowledged == 4


def test_orphans_of_dead_processes_are_removed(tmp_path: Path) -> None:
    from dynarank.files.atomic import HOST

    dead = f".step-00000003.{HOST}.{2**22 + 1}.0123abcd.tmp"
    alive = f".step-00000003.{HOST}.{os.getppid()}.0123abcd.tmp"
    elsewhere = ".step-00000003.another-host.1.0123abcd.tmp"
    old = ".step-00000003.another-host.1.0123abce.tmp"
    for name in (dead, alive, elsewhere, old):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    os.utime(tmp_path / old, (0, 0))
    Checkpoints(tmp_path)
    assert names(tmp_path) == sorted([alive, elsewhere])


def test_a_replacement_that_was_cut_is_finished(tmp_path: Path) -> None:
    for step in (1, 2):
        name = f"step-0000000{step}"
        write_folder(tmp_path / name, contents(step), step=step)
        shutil.copytree(tmp_path / name, tmp_path / f".{name}.previous")
    shutil.rmtree(tmp_path / "step-00000002")
    checkpoints = Checkpoints(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"] and litter(tmp_path) == []
    found = checkpoints.newest()
    assert found is not None and found[0] == 2


def test_warnings_are_python_warnings_by_default(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, contents(1), wait=True)
    (tmp_path / "step-00000001" / "state.json").unlink()
    with (
        pytest.warns(UserWarning, match=r"state.json cannot be read: it is missing"),
        pytest.raises(DamagedFileError),
    ):
        checkpoints.newest()


def test_a_warning_that_raises_reaches_the_run(tmp_path: Path) -> None:
    """Under ``-W error`` too, a thread's failure is not lost."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, contents(1), wait=True)
    checkpoints.save(2, contents(2), wait=True)
    (tmp_path / "step-00000002" / "state.json").unlink()
    checkpoints.save(3, contents(3))  # pytest makes errors of warnings
    with pytest.raises(UserWarning, match="step 2 is damaged"):
        checkpoints.close()


def median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


@pytest.mark.slow
def test_what_a_save_in_the_background_holds_up(tmp_path: Path) -> None:
    """The call itself takes a small part of what the write takes: the rest is in the thread."""
    checkpoints = Checkpoints(tmp_path)
    big = Contents({"model": {"w": torch.randn(8 << 20)}})
    calls, writes = [], []
    for step in range(5):
        begin = time.perf_counter()
        checkpoints.save(step, big)
        middle = time.perf_counter()
        checkpoints.drain()
        calls.append(middle - begin)
        writes.append(time.perf_counter() - begin)
    assert median(calls) < 0.1 * median(writes)


@pytest.mark.slow
def test_what_saving_in_the_background_costs_a_run(tmp_path: Path) -> None:
    """Processor time in one run, by turns with a save and without: under 1% at one a minute."""
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))  # 8 MB
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for block in range(6):
        saves = block % 2 == 0
        begin = time.process_time()
        if saves:
            weights = {n: p.detach().clone() for n, p in model.named_parameters()}
            checkpoints.save(block, Contents({"model": weights}))
        for _ in range(5):
            model(torch.randn(64, 512)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        checkpoints.drain()
        seconds[saves].append(time.process_time() - begin)
    assert median(seconds[True]) - median(seconds[False]) < 0.01 * 60
