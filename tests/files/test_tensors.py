from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dynarank.files.reading import DamagedFileError
from dynarank.files.tensors import _NAMES, load_tensors, save_tensors


def same(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    plain = [t.detach().resolve_conj().resolve_neg().flatten() for t in (one, other)]
    plain = [t.clone(memory_format=torch.contiguous_format) for t in plain]
    return torch.equal(plain[0].view(torch.uint8), plain[1].view(torch.uint8))


def awkward() -> dict[str, Tensor]:
    base = torch.arange(24.0).view(2, 3, 4)
    return {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": base.transpose(0, 2),
        "view": base[:, 1],
        "shared": base,
        "again": base,
        "expanded": torch.ones(1, 3).expand(4, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "negative": torch.tensor([1 + 2j], dtype=torch.complex64).conj().imag,
        "parameter": nn.Parameter(torch.randn(3)),
        "with graph": torch.randn(3, requires_grad=True) * 2,
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        'ключ \u202e\n"': torch.ones(2),
        "": torch.ones(1),
    }


def test_awkward_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = awkward()
    save_tensors(path, tensors, {"note": "é"})
    for found in (load_tensors(path), load_file(path)):
        assert found.keys() == tensors.keys()
        assert all(same(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "é"}
    assert not load_tensors(path)["shared"].is_set_to(load_tensors(path)["again"])


@pytest.mark.parametrize("dtype", list(_NAMES), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 255, (3, 16), dtype=torch.uint8)
    tensor = tensor % 2 == 0 if dtype is torch.bool else tensor.view(dtype)
    save_tensors(tmp_path / "a", {"w": tensor})
    assert same(load_tensors(tmp_path / "a")["w"], tensor)
    assert same(load_file(tmp_path / "a")["w"], tensor)


def test_the_file_is_what_safetensors_would_have_written(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3, dtype=torch.float16), "a": torch.ones(2), "c": torch.ones(5)}
    save_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    save_tensors(tmp_path / "ours", {})
    assert load_tensors(tmp_path / "ours") == {} == load_file(tmp_path / "ours")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.zeros(2, dtype=torch.complex128),
    ],
    ids=["sparse", "meta", "complex128"],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, tensor: Tensor
) -> None:
    save_tensors(tmp_path / "a", {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"tensor 'bad' is .*convert it first"):
        save_tensors(tmp_path / "a", {"good": torch.ones(2), "bad": tensor})
    assert list(load_tensors(tmp_path / "a")) == ["w"]
    with pytest.raises(ValueError, match="__metadata__"):
        save_tensors(tmp_path / "b", {"__metadata__": torch.ones(2)})
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_is_saved_over_the_one_its_tensors_came_from(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"w": torch.arange(5.0)})
    with safe_open(tmp_path / "a", "pt") as file:  # mapped into memory
        mapped = file.get_tensor("w")
        save_tensors(tmp_path / "a", {"w": mapped})
    assert load_tensors(tmp_path / "a")["w"].tolist() == [0, 1, 2, 3, 4]


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


DAMAGED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "no header": lambda: bytes(8),
    "header beyond the file": lambda: file({}, b"", 1 << 40),
    "a lying size": lambda: file({}, b"", (1 << 64) - 1),
    "header that is a list": lambda: file([]),
    "header that is not JSON": lambda: file(b"{" * 64),
    "deep header": lambda: file(b'{"a":' * 10_000),
    "not UTF-8": lambda: file(b'{"\xff": 1}'),
    "overlap": lambda: file({"a": entry(), "b": entry()}),
    "partial overlap": lambda: file({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "hole": lambda: file({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "hole at the begin": lambda: file({"a": entry(offsets=(4, 12))}, bytes(12)),
    "more bytes than tensors": lambda: file({"a": entry()}, bytes(9)),
    "fewer bytes than tensors": lambda: file({"a": entry()}, bytes(7)),
    "key twice": lambda: file(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
    "key twice in an entry": lambda: file(
        b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "shape that does not fit": lambda: file({"a": entry((3,))}),
    "negative shape": lambda: file({"a": entry((-2,))}),
    "overflowing shape": lambda: file({"a": entry((2**62, 2**62))}),
    "huge shape": lambda: file({"a": entry((2**63,), (0, 2**63))}),
    "float offsets": lambda: file({"a": entry(offsets=(0.0, 8.0))}),
    "infinite offsets": lambda: file(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}'
    ),
    "offsets reversed": lambda: file({"a": entry(offsets=(8, 0))}),
    "unknown dtype": lambda: file({"a": entry(dtype="F31")}),
    "entry that is a number": lambda: file({"a": 1}),
    "metadata that are no text": lambda: file({"__metadata__": {"a": 1}}, b""),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_damaged_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(DAMAGED[kind]())
    with pytest.raises(DamagedFileError, match=r"a\.safetensors cannot be read") as caught:
        load_tensors(tmp_path / "a.safetensors")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        with pytest.raises(DamagedFileError):
            load_tensors(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "nothing")
