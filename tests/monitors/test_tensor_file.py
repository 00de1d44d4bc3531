"""Tensors read one at a time, from files larger than the memory there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynarank.monitors.tensor_file import TensorFile

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_tensor_comes_back_as_it_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = {"a": torch.randn(5, 3).to(dtype), "b.c": torch.randn(2, 3, 1, 4).to(dtype)}
    save_file(saved, tmp_path / "m.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "m.safetensors")
    assert set(file.tensors) == {"a", "b.c"}
    for name, tensor in saved.items():
        found = file.read(name)
        assert found.dtype == dtype and torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bit_numbers_come_in_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = torch.randn(4, 4).to(dtype)
    save_file({"a": saved}, tmp_path / "m.safetensors")
    assert torch.equal(TensorFile(tmp_path / "m.safetensors").read("a"), saved.float())


def test_scalars_empty_tensors_and_integers_are_known(tmp_path: Path) -> None:
    save_file(
        {"s": torch.tensor(2.0), "e": torch.zeros(0, 4), "i": torch.ones(3, dtype=torch.int8)},
        tmp_path / "m.safetensors",
    )
    file = TensorFile(tmp_path / "m.safetensors")
    assert file.read("s").item() == 2.0 and file.read("e").shape == (0, 4)
    assert file.tensors["i"].dtype is None


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BROKEN = {
    "empty": b"",
    "short": b"\x01\x00",
    "header": (1 << 40).to_bytes(8, "little") + b"{}",
    "not JSON": (2).to_bytes(8, "little") + b"{[",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "no entry": (8).to_bytes(8, "little") + b'{"a": 1}',
}
WRONG = {
    "too short": ({"a": entry([2, 2], 0, 16)}, 12),
    "too long": ({"a": entry([2, 2], 0, 16)}, 20),
    "shape": ({"a": entry([2, 3], 0, 16)}, 16),
    "backwards": ({"a": entry([2, 2], 16, 0)}, 0),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2, 2]}}, 16),
}


@pytest.mark.parametrize("case", [*BROKEN, *WRONG])
def test_what_is_not_whole_is_an_error(tmp_path: Path, case: str) -> None:
    data = BROKEN.get(case)
    if data is None:
        header, size = WRONG[case]
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + b"\0" * size
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.safetensors is not a whole safetensors file"):
        TensorFile(tmp_path / "m.safetensors")


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(64, 64)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="it ends early"):
        file.read("a")


LARGE = """
import resource, sys
from pathlib import Path
from dynarank.monitors.file_spectra import file_spectra
next(file_spectra(Path(sys.argv[1])))  # what the first spectrum brings in
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (192 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(1 for _ in file_spectra(Path(sys.argv[2]))))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits on the address space")
def test_a_model_larger_than_the_memory_is_read(tmp_path: Path) -> None:
    """384 MiB in tensors of 8 MiB, of holes, with no room for more than 192 MiB."""
    count, columns = 48, 1 << 20
    tensors = {f"w{i}": entry([2, columns], i << 23, (i + 1) << 23) for i in range(count)}
    header = json.dumps(tensors).encode()
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (count << 23))
    save_file({"a": torch.ones(2, 1 << 20)}, tmp_path / "s.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path / "s.safetensors", tmp_path / "large.safetensors"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    read, grown = map(int, done.stdout.split())
    assert read == count
    assert grown < 128 * 1024  # KiB
