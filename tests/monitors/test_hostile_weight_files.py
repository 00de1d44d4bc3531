"""Files of weights that are damaged or made to harm: one short error, bounded memory and time."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import mutated
from hypothesis import given, settings
from safetensors.torch import save_file

from dynarank.files.reading import DamagedFileError
from dynarank.monitors.file_spectra import file_spectra
from dynarank.monitors.weight_files import open_weights

GIB = 1 << 30


def tensor(shape: list[Any], *offsets: float) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


def stored(header: bytes | dict[str, Any], floats: int = 4, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    values = np.arange(1, 1 + floats, dtype=np.float32).tobytes()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


ONE = b'"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
HOSTILE: dict[str, bytes] = {
    "deep": stored(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "infinite": stored(b'{"a":{"dtype":"F32","shape":[Infinity,2],"data_offsets":[0,16]}}'),
    "negative": stored({"a": tensor([-2, -2], 0, 16)}),
    "float offsets": stored({"a": tensor([2, 2], 0.0, 16.0)}),
    "float shape": stored({"a": tensor([2.0, 2], 0, 16)}),
    "lying size": stored({"a": tensor([1 << 40, 1 << 20], 0, 16)}),
    "overflowing size": stored({"a": tensor([1 << 62, 1 << 62], 0, 16)}),
    "nothing but zeros": stored({"a": tensor([0, 1 << 62], 0, 0)}, 0),
    "overlap": stored({"a": tensor([2, 2], 0, 16), "b": tensor([2, 2], 8, 24)}, 6),
    "same place": stored({"a": tensor([2, 2], 0, 16), "b": tensor([2, 2], 0, 16)}),
    "hole": stored({"a": tensor([2, 2], 0, 16), "b": tensor([2, 2], 24, 40)}, 10),
    "bytes left over": stored({"a": tensor([2, 2], 0, 16)}, 8),
    "key twice": stored(b"{" + ONE + b"," + ONE + b"}"),
    "field twice": stored(b'{"a":{"dtype":"F32","shape":[2,2],"shape":[4],"data_offsets":[0,16]}}'),
    "two of one name": stored({"a": tensor([2, 2], 0, 16), "a.weight": tensor([2, 2], 16, 32)}, 8),
    "huge header": stored({"a": tensor([2, 2], 0, 16)}, length=1 << 63),
    "not UTF-8": stored(b'{"\xff":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'),
    "scalar": stored({"a": tensor([], 0, 4)}, 1),
    "long name": stored({"a" * 1_000_000: tensor([-2], 0, 8)}),
    "empty": b"",
    "short": b"abc",
    "pickle": b"\x80\x02cos\nsystem\n(S'touch harmed'\ntR.",
    "zip": b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_read_is_refused_in_one_short_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        list(file_spectra(path))
    assert len(str(error.value)) < 600
    assert str(error.value).isprintable()


@pytest.mark.parametrize("beside", ["chain", "single"])
def test_a_factor_chain_beside_a_weight_of_its_name_is_refused(tmp_path: Path, beside: str) -> None:
    factors = {"x.down": torch.ones(2, 4), "x.up": torch.ones(4, 2)}
    more = {"x": torch.ones(4, 4)} if beside == "single" else {"x.weight": torch.ones(4, 4)}
    save_file(factors | more, tmp_path / "model.safetensors")
    with pytest.raises(DamagedFileError, match=r"are both the weight of x; rename one"):
        list(file_spectra(tmp_path))


def test_factors_that_multiply_to_terabytes_are_refused(tmp_path: Path) -> None:
    side = 1 << 14
    shapes = {"x.down": (1, side, 1, 1), "x.core": (1, 1, 9, 9), "x.up": (side, 1, 1, 1)}
    save_file({n: torch.ones(s) for n, s in shapes.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"multiply to 21,743,271,936 values, at most 268,435,456"):
        list(file_spectra(tmp_path))


def index_of(folder: Path, content: object) -> Path:
    path = folder / "model.safetensors.index.json"
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(text)
    return path


INDEXES: dict[str, object] = {
    "deep": b'{"weight_map":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a list": [],
    "no map": {"metadata": {}},
    "map of numbers": {"weight_map": {"a": 1}},
    "key twice": b'{"weight_map":{"a":"m.safetensors","a":"n.safetensors"}}',
    "outside": {"weight_map": {"a": "../m.safetensors"}},
    "absolute": {"weight_map": {"a": "/dev/zero"}},
    "a zero byte": {"weight_map": {"a": "m\0.safetensors"}},
    "escape codes": {"weight_map": {"\x1b[2Ja\n" * 1000: "m.safetensors"}},
    "a long shard": {"weight_map": {"a": "\x1b" * 100_000 + "/m"}},
    "not UTF-8": b"\xff",
    "empty": b"",
    "a pipe": {"weight_map": {"a": "pipe"}},
    "a folder": {"weight_map": {"a": "folder"}},
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    save_file({"b": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    index = index_of(tmp_path, INDEXES[name])
    with pytest.raises(DamagedFileError) as error:
        open_weights(index)
    assert len(str(error.value)) < 700
    assert str(error.value).isprintable()


def test_a_long_index_over_many_shards_takes_a_moment(tmp_path: Path) -> None:
    count, shards = 30_000, 300
    for i in range(shards):
        rows = {f"w{j}": torch.zeros(1) for j in range(i, count, shards)}
        save_file(rows, tmp_path / f"{i}.safetensors")
    places = {f"w{j}": f"{j % shards}.safetensors" for j in range(count)}
    assert len(open_weights(index_of(tmp_path, {"weight_map": places})).homes) == count


def test_a_pipe_and_a_device_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", Path("/dev/zero")):
        with pytest.raises(DamagedFileError, match="it is not a regular file"):
            open_weights(path)


def test_links_to_files_elsewhere_are_read_as_in_a_cache_of_models(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file({"a": torch.eye(3)}, blobs / "1")
    index_of(blobs, {"weight_map": {"a": "model-1.safetensors"}}).rename(blobs / "2")
    (snapshot / "model-1.safetensors").symlink_to(blobs / "1")
    (snapshot / "model.safetensors.index.json").symlink_to(blobs / "2")
    (found,) = file_spectra(snapshot)
    assert found.name == "a"


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 * GIB, 8 * GIB))

    command = [sys.executable, "-m", "dynarank", "spectrum", *map(str, arguments), "--no-plot"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, preexec_fn=limit,
                          timeout=120, check=False)  # fmt: skip


def test_a_sparse_file_of_a_terabyte_ends_in_one_line(tmp_path: Path) -> None:
    side = 1 << 19
    header = stored({"a": tensor([side, side], 0, side * side * 4)}, 0)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + side * side * 4)
    done = run(tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-2000:]
    assert done.stderr.startswith("dynarank: error: ") and "model.safetensors" in done.stderr


def test_names_reach_the_terminal_as_one_printable_line(tmp_path: Path) -> None:
    name = "\x1b[31mred\x1b[0m\r\n\u202etxt [bold]x[/] \x07"
    save_file({name: torch.eye(3), "b" * 3_000: torch.eye(3)}, tmp_path / "m.safetensors")
    done = run(tmp_path / "m.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(line.isprintable() for line in done.stdout.split("\n"))
    assert r"\x1b[31mred\x1b[0m\r\n\u202etxt [bold]x[/] \x07" in done.stdout
    assert max(map(len, done.stdout.split("\n"))) < 1_200


def test_errors_are_printable_and_short(tmp_path: Path) -> None:
    done = run("\x1b[2Jno\nwhere" + "a" * 200, cwd=tmp_path)
    assert done.returncode == 2
    assert r"no file \x1b[2Jno\nwhere" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["1a" * 50_000, "a_" * 50_000 + "x", "parametrizations." * 5_000 + "original1", "9" * 100_000,
     "x.lora_A." * 10_000, "conv" * 20_000 + "7" * 5_000],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_long_names_take_no_time(tmp_path: Path, name: str) -> None:
    kernel = torch.ones(2, 2, 3)
    save_file({name: torch.eye(2), f"{name}_v": torch.eye(2), f"{name}k": kernel},
              tmp_path / "m.safetensors")  # fmt: skip
    assert len(list(file_spectra(tmp_path))) == 3


@settings(deadline=None, max_examples=300)
@given(mutation=mutated(stored({"a": tensor([2, 2], 0, 16), "x.down": tensor([1, 2], 16, 24),
                                "x.up": tensor([2, 1], 24, 32)}, 8)))  # fmt: skip
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, mutation: bytes
) -> None:
    folder = tmp_path_factory.mktemp("file")
    (folder / "model.safetensors").write_bytes(mutation)
    try:
        found = list(file_spectra(folder))
    except ValueError as error:
        assert len(str(error)) < 700
    else:
        assert all(len(one.shape) > 1 for one in found)


@settings(deadline=None, max_examples=150)
@given(
    mutation=mutated(json.dumps({"metadata": {}, "weight_map": {"b": "m.safetensors"}}).encode())
)
def test_damaged_indexes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, mutation: bytes
) -> None:
    folder = tmp_path_factory.mktemp("index")
    save_file({"b": torch.ones(2, 2)}, folder / "m.safetensors")
    try:
        open_weights(index_of(folder, mutation))
    except (DamagedFileError, FileNotFoundError) as error:
        assert len(str(error)) < 700
