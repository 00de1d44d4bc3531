"""Weights in files: single files, shards, folders and runs; one tensor in memory at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dynarank as dr
from dynarank import LowRank
from dynarank.monitors.file_spectra import file_spectra
from dynarank.monitors.weight_files import TensorFile, open_weights

INDEX = "model.safetensors.index.json"


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
    with pytest.raises(ValueError, match=r"m\.safetensors cannot be read: .*not a complete"):
        TensorFile(tmp_path / "m.safetensors")


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(64, 64)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"m\.safetensors cannot be read: .* not a complete"):
        file.read("a")


LARGE = """
import resource, sys
from pathlib import Path
from dynarank.monitors.file_spectra import file_spectra
next(file_spectra(Path(sys.argv[1])))  # what the first spectrum brings in
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
limit = (int(status["VmData"].split()[0]) << 10) + (64 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(1 for _ in file_spectra(Path(sys.argv[2]))))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on allocated memory")
def test_a_model_larger_than_the_memory_is_read(tmp_path: Path) -> None:
    """384 MiB in tensors of 8 MiB, of holes, with no room to allocate more than 64 MiB."""
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
    assert grown < 64 * 1024  # KiB: what is mapped and read would count as well


def sharded(folder: Path, **wrong: Any) -> Path:
    """Two shards of two weights each, a tied one stored once."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    shards = {
        "model-00001-of-00002.safetensors": {"embed.weight": torch.randn(6, 4), "a": torch.ones(3)},
        "model-00002-of-00002.safetensors": {"head.weight": torch.randn(5, 4),
                                             "mlp.weight": torch.randn(4, 4)},
    }  # fmt: skip
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": {**places, **wrong}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def names(path: Path) -> list[str]:
    return [spectrum.name for spectrum in file_spectra(path)]


def test_a_sharded_folder_and_its_index_are_read(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    assert names(folder) == names(folder / INDEX) == ["embed", "head", "mlp"]


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    save_file({"x.weight": torch.ones(3, 3)}, tmp_path / "adapter.safetensors")
    assert names(tmp_path) == ["x"]
    save_file({"y.weight": torch.ones(3, 3)}, tmp_path / "model.safetensors")
    assert names(tmp_path) == ["y"]


def test_factors_may_lie_in_different_shards(tmp_path: Path) -> None:
    save_file({"x.down": torch.ones(1, 4)}, tmp_path / "1.safetensors")
    save_file({"x.up": torch.ones(3, 1)}, tmp_path / "2.safetensors")
    places = {"x.down": "1.safetensors", "x.up": "2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    (spectrum,) = file_spectra(tmp_path)
    assert spectrum.name == "x" and spectrum.shape == (3, 4)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002\S* of .* missing: 2 of 4 tensors"):
        open_weights(tmp_path)


def test_a_cut_shard_is_named(tmp_path: Path) -> None:
    shard = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(
        ValueError, match=r"00002-of-00002\.safetensors cannot be read: .* not a complete"
    ):
        open_weights(tmp_path)


def test_an_index_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, **{"b.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(
        ValueError, match=r"does not match its shards: 'b.weight' should be in model"
    ):
        open_weights(folder)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2, 2)}, tmp_path / "secret.safetensors")
    folder = sharded(tmp_path / "model", b="../secret.safetensors")
    with pytest.raises(ValueError, match="outside its folder"):
        open_weights(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '"x"', "null"]
)
def test_a_damaged_index_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json cannot be read: "):
        open_weights(tmp_path)


def test_folders_of_runs_and_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="contains no weights"):
        open_weights(tmp_path)
    for run in ("full-rank", "low-rank"):
        (tmp_path / run).mkdir()
        save_file({"a": torch.ones(2, 2)}, tmp_path / run / "model.safetensors")
    with pytest.raises(ValueError, match=r"several runs, name one or two of: .*full-rank, .*low-r"):
        open_weights(tmp_path)
    assert names(tmp_path / "low-rank") == ["a"]
    (tmp_path / "low-rank" / "model.safetensors").unlink()
    (tmp_path / "low-rank" / "records.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="has not finished"):
        open_weights(tmp_path / "low-rank")


def test_several_files_that_no_index_joins_are_named(tmp_path: Path) -> None:
    for name in "ab":
        save_file({name: torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"name one: a\.safetensors, b\.safetensors"):
        open_weights(tmp_path)


LAYERS = {
    "linear": nn.Linear(10, 6),
    "conv1d": nn.Conv1d(6, 8, 3),
    "conv2d": nn.Conv2d(6, 8, (3, 2)),
    "conv3d": nn.Conv3d(4, 6, (3, 2, 1)),
    "grouped": nn.Conv2d(8, 12, 3, groups=4),
    "transposed": nn.ConvTranspose2d(6, 8, 3),
}


@pytest.mark.parametrize("decomposition", ["svd", "tucker", "cp", "separable"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [1, 2])
def test_a_low_rank_layer_of_any_decomposition_is_its_product(
    kind: str, decomposition: str, rank: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"x": LAYERS[kind]}).double()
    dr.merge(model)
    dr.apply_plan(model, {"x": LowRank(rank, decomposition)})
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    (spectrum,) = file_spectra(tmp_path)
    (site,) = dr.survey(model)
    expected = torch.linalg.svdvals(site.effective().detach().flatten(1))
    assert spectrum.name == "x" and spectrum.shape == site.shape
    assert spectrum.values is not None
    torch.testing.assert_close(spectrum.values, expected, rtol=0, atol=1e-7 * float(expected[0]))


def test_weights_of_several_in_a_module_are_found_by_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"x": nn.LSTM(6, 8)})
    dr.factorize(model, 2)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    assert sorted(names(tmp_path)) == ["x.weight_hh_l0", "x.weight_ih_l0"]
