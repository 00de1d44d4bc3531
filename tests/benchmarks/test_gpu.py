"""The GPU benchmark: every part at toy size, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_cuda import MixedDevicesError, pretended_cuda

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import worker
from benchmarks.gpu.bench import Bench, spread
from benchmarks.gpu.clocks import watched
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.device import CPU, CUDA, Times, device_of
from benchmarks.gpu.forms import plans
from benchmarks.gpu.models import filled
from benchmarks.gpu.parts import convolutions, equal_time, products, resnet
from benchmarks.gpu.record import Record
from benchmarks.gpu.sizes import FULL, TOY, Sizes
from benchmarks.gpu.tables import tables
from benchmarks.gpu.text import read_text
from benchmarks.gpu.timetable import SHARES, allowance
from dynarank.cost import trace
from dynarank.cost.stand_in import meta_copy
from dynarank.train.gpt import GPT

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
ENV |= {"PYTHONWARNINGS": "error"}

# What each row of a part has at least.
COLUMNS = {
    "gpt": {"width", "form", "flops", "trainable", "peak_bytes", "ms", "n", "tokens_per_second"},
    "equal_time": {"form", "rate", "points", "cuts", "steps", "flops", "loss", "peak_bytes"},
    "cuts": {"function", "rows", "ms", "n"},
    "products": {"width", "tokens", "form", "rank", "flops", "ms", "n"},
    "convolutions": {"channels", "pixels", "form", "flops", "ms", "n"},
    "resnet": {"epoch_seconds", "host_ms_a_step", "batch", "images", "trainable", "flops_a_step"},
    "compiled": {"form", "execution", "ms", "first_step_seconds", "tokens_per_second"},
}
ROWS = {
    "gpt": 11, "equal_time": 6, "cuts": 8, "products": 4, "convolutions": 7, "resnet": 6,
    "compiled": 8,
}  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def measure(folder: Path, parts: str, seconds: float = 240, device: str = "cpu") -> dict[str, Any]:
    """Run parts at toy size in this process."""
    end, chosen = time.time() + seconds, parts.split(",")
    worker.measure(Namespace(out=folder, device=device, end=end, parts=chosen, toy=True, data=None))
    return results(folder)


ENDLESS = """
from dataclasses import replace
from benchmarks.gpu import worker
worker.TOY = replace(worker.TOY, rounds=10**6)
worker._main()
"""


def endless_worker(folder: Path, parts: str, seconds: float) -> subprocess.Popen[bytes]:
    """A process that measures again and again, so that it is always in the middle."""
    end = str(time.time() + seconds)
    options = ["--out", str(folder), "--parts", parts, "--end", end, "--toy", "--device", "cpu"]
    return subprocess.Popen([sys.executable, "-c", ENDLESS, *options], env=ENV, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_has_every_row_of_every_part(tmp_path: Path) -> None:
    """In one test, so that two processes of tests do not both run it."""
    line = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    line += ["--toy", "--device", "cpu", "--minutes", "14"]  # it ends when all parts are done
    subprocess.run(line, env=ENV, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = results(tmp_path)
    for part in SHARES:
        rows_are_whole(part, found["parts"][part])
    runs_of_equal_time_are_right(found["parts"]["equal_time"])
    tables_have_a_line_for_each_row(found, tables(tmp_path))


def rows_are_whole(part: str, found: dict[str, Any]) -> None:
    assert found["status"] == "done", found
    assert len(found["rows"]) == ROWS[part]
    for key, row in found["rows"].items():
        assert "error" not in row, row
        assert COLUMNS[part] <= set(row), (key, row)


def runs_of_equal_time_are_right(found: dict[str, Any]) -> None:
    """Each has its points, and decays are cut."""
    assert {"text", "train_bytes", "held_out_bytes", "sha256"} <= set(found["text"])
    for row in found["rows"].values():
        for key in ("seconds", "steps", "flops"):
            values = [point[key] for point in row["points"]]
            assert values == sorted(values)
            assert values[-1] > values[0] == 0
        assert row["seconds"] >= found["seconds_a_run"]
        assert row["warnings"] == []
        assert bool(row["cuts"]) == (row["form"] == "decay")
        total = sum(cut["seconds"] for cut in row["cuts"])
        assert row["cut_seconds"] == pytest.approx(total, abs=1e-5)  # of rounded seconds
        assert row["cut_seconds"] <= row["seconds"]
    full, low = (found["rows"][key] for key in ("full rank", "low rank 1/4"))
    assert full["flops_relative_per_step"] == 1 > low["flops_relative_per_step"]


def tables_have_a_line_for_each_row(found: dict[str, Any], text: str) -> None:
    for part, number in ROWS.items():
        section = text.split(f"## {part}\n")[1].split("\n## ")[0].split("Held-out loss")[0]
        rows = [line for line in section.splitlines() if line.startswith("| ")]
        assert len(rows) == number + 1
    assert found["about"]["versions"]["torch"] in text
    assert str(ROOT) not in json.dumps(found)


def test_a_part_that_raises_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bench: Bench) -> None:
        bench.put("a row", ms=1.0)
        raise ArithmeticError("no such product")

    monkeypatch.setattr(products, "run", fails)
    parts = measure(tmp_path, "products,convolutions")["parts"]
    assert parts["products"]["status"] == "failed"
    assert parts["products"]["error"] == "ArithmeticError: no such product"
    assert parts["products"]["rows"] == {"a row": {"ms": 1.0}}
    assert parts["convolutions"]["status"] == "done"
    assert "no such product" in tables(tmp_path)


@pytest.mark.parametrize(
    ("error", "recorded"),
    [
        (torch.OutOfMemoryError("of 1 TiB"), "out of memory"),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
def test_a_row_that_raises_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, recorded: str
) -> None:
    make = convolutions._made

    def fails(channels: int, form: object, device: CPU) -> torch.nn.Module:
        if "merged" in str(form):
            raise error
        return make(channels, form, device)

    monkeypatch.setattr(convolutions, "_made", fails)
    part = measure(tmp_path, "convolutions")["parts"]["convolutions"]
    errors = {key: row["error"] for key, row in part["rows"].items() if "error" in row}
    assert list(errors.values()) == [recorded] * 2
    assert sum("ms" in row for row in part["rows"].values()) == ROWS["convolutions"] - 2
    assert recorded in tables(tmp_path)


def test_a_device_that_no_longer_works_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bench: Bench) -> None:
        with bench.attempt("a row"):
            monkeypatch.setattr(CPU, "usable", lambda device: False)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(products, "run", fails)
    with pytest.raises(SystemExit):
        measure(tmp_path, "products,convolutions")
    parts = results(tmp_path)["parts"]
    assert parts["products"]["status"] == "failed"
    assert "convolutions" not in parts


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_kill_in_the_middle_leaves_a_valid_file_with_the_rows_so_far(tmp_path: Path) -> None:
    process, path = endless_worker(tmp_path, "gpt", seconds=300), tmp_path / "results.json"
    try:
        until = time.monotonic() + 240
        while not (path.exists() and '"ms"' in path.read_text()):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    part = results(tmp_path)["parts"]["gpt"]
    assert part["status"] == "running"
    assert any("ms" in row for row in part["rows"].values())
    assert "| full rank |" in tables(tmp_path)


def test_after_a_process_that_died_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def process(options: Namespace, parts: list[str], end: float) -> int:
        asked.append(parts)
        record = Record(options.out)
        record.part(parts[0], status="running")
        record.row(parts[0], "a row", {"form": "plain"})
        if len(asked) == 1:
            return -9
        for name in parts:
            record.part(name, status="done", seconds=1.0)
        return 0

    monkeypatch.setattr(command, "_process", process)
    assert command.main(["--out", str(tmp_path), "--parts", "convolutions,products,gpt"]) == 1
    assert asked == [["gpt", "products", "convolutions"], ["products", "convolutions"]]
    parts = results(tmp_path)["parts"]
    assert parts["gpt"] | {"rows": {}} == {
        "rows": {}, "status": "stopped", "error": "its process ended with -9"
    }  # fmt: skip
    assert [parts[name]["status"] for name in asked[1]] == ["done", "done"]
    with pytest.raises(SystemExit):  # there are results already
        command.main(["--out", str(tmp_path)])
    assert "has results already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["done", "done"], 0), (["done", "out of time"], 0), (["done", "failed"], 1),
        (["stopped", "done"], 1), (["done"], 1),
    ],
)  # fmt: skip
def test_the_exit_status_says_whether_every_part_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: list[str], code: int
) -> None:
    def process(options: Namespace, parts: list[str], end: float) -> int:
        record = Record(options.out)
        for name, status in zip(("gpt", "products"), statuses, strict=False):
            if name in parts:
                record.part(name, status=status, seconds=1.0)
        return 0

    monkeypatch.setattr(command, "_process", process)
    assert command.main(["--out", str(tmp_path), "--parts", "gpt,products"]) == code


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--minutes", "0"], "'0' is not a finite number above 0"),
        (["--minutes", "nan"], "'nan' is not a finite number above 0"),
        (["--minutes", "inf"], "'inf' is not a finite number above 0"),
        (["--device", "cpu"], "give --toy too"),
    ],
)
def test_what_would_measure_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--out", str(tmp_path), *words])
    assert told in capsys.readouterr().err


def test_a_start_that_failed_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_process", lambda *_: 1)
    assert command.main(["--out", str(tmp_path), "--parts", "gpt"]) == 1
    assert "error" in results(tmp_path)["about"]
    monkeypatch.setattr(
        command, "_process", lambda o, parts, _: Record(o.out).part(parts[0], status="done")
    )
    assert command.main(["--out", str(tmp_path), "--parts", "gpt"]) == 0


def test_without_a_gpu_it_says_so_and_stops(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="sees no GPU"):
        device_of("cuda")


def test_the_deadline_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "TOY", replace(TOY, rounds=10**6, longest=60.0))
    begun = time.monotonic()
    parts = measure(tmp_path, "products,convolutions", seconds=6)["parts"]
    assert time.monotonic() - begun < 16
    assert [part["status"] for part in parts.values()] == ["out of time"] * 2
    assert sum(part["seconds_allowed"] for part in parts.values()) <= 7
    assert any("n" in row for part in parts.values() for row in part["rows"].values())


def test_a_part_that_does_not_look_at_its_deadline_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, bool]] = []
    watch = worker.faulthandler
    monkeypatch.setattr(
        watch, "dump_traceback_later", lambda s, exit, file: asked.append((s, exit))
    )
    part = measure(tmp_path, "products", seconds=30)["parts"]["products"]
    assert asked == [(pytest.approx(part["seconds_allowed"] + worker.GRACE, rel=1e-4), True)]


def test_the_time_that_a_part_leaves_is_for_those_after_it() -> None:
    parts, left, allowed = list(SHARES), 540.0, []
    for i, name in enumerate(parts):
        allowed.append(allowance(name, parts[i + 1 :], left))
        left -= allowed[-1]
    assert sum(allowed) == pytest.approx(540)
    assert allowed == pytest.approx([540 * s / sum(SHARES.values()) for s in SHARES.values()])
    assert allowance("compiled", [], 100.0) == pytest.approx(100)


def test_the_file_is_valid_whatever_is_written(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.part("gpt", status="running")
    record.row("gpt", "a", {"loss": float("nan"), "path": Path("x"), "list": (1.23456789, None)})
    row = results(tmp_path)["parts"]["gpt"]["rows"]["a"]
    assert row == {"loss": None, "path": "x", "list": [1.23457, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert Record(tmp_path).data == results(tmp_path)


def test_books_are_read_from_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "books" / "split"
    folder.mkdir(parents=True)
    (folder / "train_1mb.txt").write_bytes(b"abc" * 10)
    (folder / "valid.txt").write_bytes(b"xyz")
    text = read_text(tmp_path, 20)
    assert (text.train.tolist(), text.held_out.tolist()) == ([*(b"abc" * 7)[:20]], [*b"xyz"])
    assert text.about()["text"] == "books"
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "books", 20)


def test_only_torch_and_numpy_are_needed() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "typer", "rich", "safetensors", "sklearn"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import benchmarks.gpu.worker
from benchmarks.gpu.parts import compiled, convolutions, cuts, equal_time, gpt, products, resnet
import dynarank as dr
dr.RankScheduler, dr.schedules.decay
"""
    subprocess.run([sys.executable, "-c", code], env=ENV, cwd=ROOT, check=True)


def test_models_without_a_decomposition_have_the_parameters_of_their_plan() -> None:
    outline = meta_copy(GPT(32, 8, width=32, depth=1, heads=2))
    use = trace(outline, torch.zeros(2, 8, dtype=torch.long, device="meta"))
    for name, plan in plans(use, 4).items():
        model = filled(outline, plan, CPU())
        held = [p.numel() for p in model.parameters()]
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        assert (sum(trained), sum(held)) == use.parameters(plan), name
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert all(bool(p.any()) for p in model.parameters() if p.ndim > 1)


def test_rounded_ranks_are_multiples_and_cost_no_more() -> None:
    use = trace(GPT(32, 8, width=64, depth=1, heads=2), torch.zeros(2, 8, dtype=torch.long))
    found = plans(use, 8)
    for name, plan in found.items():
        if name.endswith("ranks 8 k"):
            assert all(form.rank % 8 == 0 for form in plan.values())
            whole = found[name.partition(",")[0]]
            assert use.flops(plan).training <= use.flops(whole).training


def test_the_gpu_is_waited_for_before_times_are_read() -> None:
    with pretended_cuda() as calls:
        times = CUDA().times(lambda: calls.names.append("step"), 2)
    assert (len(times.device), len(times.host), times.ahead) == (2, 2, [])
    assert calls.names == [
        "synchronize", "record", "step", "record", "step", "record", "synchronize",
        "elapsed_time", "elapsed_time",
    ]  # fmt: skip


def test_a_gpu_that_must_not_wait_for_python_spins_first() -> None:
    with pretended_cuda() as calls:
        times = CUDA().times(lambda: calls.names.append("step"), 1, ahead=True)
    assert times.ahead == [True]
    assert calls.names == [
        "synchronize", "_sleep", "record", "step", "record", "query", "synchronize",
        "elapsed_time",
    ]  # fmt: skip
    times += Times([1.0], [0.5], [False])
    assert spread(times)["ahead"] is False


@pytest.mark.parametrize("sizes", [FULL, TOY])
def test_all_batches_of_an_epoch_have_one_shape(tmp_path: Path, sizes: Sizes) -> None:
    """Another shape would be tuned in the middle of a timed epoch."""
    bench = Bench("resnet", Meta(), sizes, Deadline(60), Record(tmp_path))
    images, labels = resnet._images(bench)
    assert len(images) == len(labels) > sizes.epoch - sizes.many
    assert not any(len(images) % batch for _, batch in resnet._arms(bench).values())


class Meta(CPU):
    kind = "meta"


def test_the_memory_is_that_of_the_allocator() -> None:
    with pretended_cuda() as calls:
        device = CUDA()
        device.reset_peak()
        assert (device.peak(), device.allocated()) == (2_000_000, 1_000_000)
        device.free()
    assert calls.names == [
        "synchronize", "reset_peak_memory_stats", "synchronize", "max_memory_allocated",
        "memory_allocated", "empty_cache",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "answer", [None, "", "580.1, 1980 MHz, 3201 MHz, 1980 MHz, 99 W, 700 W, 40\n"]
)
def test_clocks_are_read_if_they_can_be(
    monkeypatch: pytest.MonkeyPatch, answer: str | None
) -> None:
    def run(*args: Any, **options: Any) -> Any:
        if answer is None:
            raise FileNotFoundError("nvidia-smi")
        return Namespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    found = CUDA().clocks()
    assert found["clocks.sm"] == "1980 MHz" if answer else "clocks.sm" not in found


def test_clocks_are_read_while_a_part_runs() -> None:
    class Warm(CPU):
        def clocks(self) -> dict[str, str]:
            seen.set()
            return {"clocks.sm": "1980 MHz"}

    seen = threading.Event()
    with watched(Warm(), every=0.001) as found:
        assert seen.wait(30)
    assert found[0] == {"clocks.sm": "1980 MHz"}
    count = len(found)
    time.sleep(0.05)
    assert len(found) == count


def test_there_is_time_for_every_run_of_equal_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes its seconds, and to make a model and to plan takes some too."""
    bench = Bench("equal_time", CPU(), FULL, Deadline(280.0), Record(tmp_path))
    bench.record.part("equal_time", status="running")
    trained: list[str] = []

    def known(bench: Bench, arms: int) -> Any:
        return Namespace(seconds=equal_time._seconds(bench, arms))

    def train(bench: Bench, arm: equal_time.Arm, known: Any) -> None:
        trained.append(arm.name)
        bench.deadline = Deadline(bench.deadline.left - known.seconds - 4.0)

    monkeypatch.setattr(equal_time, "_known", known)
    monkeypatch.setattr(equal_time, "_train", train)
    equal_time.run(bench)
    assert trained == [arm.name for arm in equal_time._arms(64)]
    assert "left_out" not in bench.record.data["parts"]["equal_time"]


def test_a_pretended_gpu_refuses_what_a_gpu_does() -> None:
    with pretended_cuda():
        on, off = torch.ones(3, device="cuda"), torch.ones(3)
        assert (on * 2).device.type == off.to("cuda").device.type == "cuda"
        assert off.device.type == on.to("cpu").device.type == "cpu"
        with pytest.raises(MixedDevicesError):
            on + off
        with torch.device("cuda"):
            layer = torch.nn.Linear(3, 3)
        with pytest.raises(MixedDevicesError):
            layer(off)


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in SHARES if part != "compiled"])
def test_nothing_is_on_the_wrong_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(worker, "TOY", replace(TOY, rounds=1))
    with pretended_cuda() as calls:
        found = measure(tmp_path, part, device="cuda")
    assert found["about"]["device"]["name"] == "pretended"
    rows = found["parts"][part]["rows"]
    assert found["parts"][part]["status"] == "done"
    assert len(rows) == ROWS[part] + 3 * (part == "cuts")  # the drivers of a GPU
    assert not [row["error"] for row in rows.values() if "error" in row]
    assert "synchronize" in calls.names


def test_one_that_fails_among_candidates_is_out(tmp_path: Path) -> None:
    record, told = Record(tmp_path), dict[str, int]()
    record.part("gpt", status="running")
    bench = Bench("gpt", CPU(), replace(TOY, rounds=3), Deadline(60), record)

    def fails() -> None:
        raise torch.OutOfMemoryError

    steps: dict[str, Callable[[], object]] = {"a": lambda: None, "b": fails, "c": lambda: None}
    bench.alternate(steps, lambda key, times: told.update({key: len(times.device)}))
    assert told == {"a": 3, "c": 3}
    assert record.data["parts"]["gpt"]["rows"] == {"b": {"error": "out of memory"}}


def test_the_memory_of_one_that_failed_is_free_before_the_next(tmp_path: Path) -> None:
    held, gone = list[weakref.ref[torch.Tensor]](), list[bool]()

    class Freed(CPU):
        def free(self) -> None:
            gone.append(held[0]() is None)

    def fails() -> None:
        activations = torch.ones(1)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError

    bench = Bench("gpt", Freed(), TOY, Deadline(60), Record(tmp_path))
    bench.record.part("gpt", status="running")
    for step in (fails, lambda: None, lambda: None):
        with bench.attempt("a row"):
            step()
    assert gone == [True]
