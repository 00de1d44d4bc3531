"""Files of other formats are refused by what they are, with the way out, under any name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynarank.files.reading import DamagedFileError
from dynarank.monitors.weight_files import open_weights

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"
KNOWN = {
    "LFS pointer": (LFS, "git lfs pull"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 50, "converted from"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 50, r"safetensors\.numpy\.save_file"),
    "web page": (b"<!DOCTYPE html><html>", "download it again"),
    "gzip": (b"\x1f\x8b\x08\0", "unpack it"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.gguf", "m.h5"])
@pytest.mark.parametrize("kind", KNOWN)
def test_the_content_tells(kind: str, name: str, tmp_path: Path) -> None:
    data, way_out = KNOWN[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DamagedFileError, match=f"cannot be read: .*{kind}.*; .*{way_out}") as error:
        open_weights(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_pointer_among_shards_is_named(tmp_path: Path) -> None:
    (tmp_path / "m-1.safetensors").write_bytes(LFS)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "m-1.safetensors"}}')
    with pytest.raises(DamagedFileError, match=r"m-1\.safetensors cannot be read: .*LFS pointer"):
        open_weights(tmp_path)


def test_arrays_of_numpy(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.ones((2, 2)))
    np.save(tmp_path / "w.npy", np.ones((2, 2)))
    for name in ("w.npz", "w.npy"):
        with pytest.raises(DamagedFileError, match=r"NumPy.*; save it with safetensors"):
            open_weights(tmp_path / name)


@pytest.mark.parametrize("ending", ["onnx", "msgpack", "tflite", "pb"])
def test_the_name_tells_where_the_content_does_not(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"m.{ending}").write_bytes(b"\x08\x07\x12\x00" * 10)
    with pytest.raises(DamagedFileError, match=r"cannot be read: it is a"):
        open_weights(tmp_path / f"m.{ending}")
