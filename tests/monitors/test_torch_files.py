"""Files of ``torch.save``: read without running code, nested or with the prefixes of wrappers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stored import random
from torch import Tensor, nn

import dynarank as dr
from dynarank.files.reading import DamagedFileError
from dynarank.monitors import torch_files
from dynarank.monitors.file_spectra import file_spectra, read_spectrum
from dynarank.monitors.stored_weights import stored_weights, survey_files
from dynarank.monitors.weight_files import open_weights

STATE = {"a.weight": random(6, 5), "a.bias": torch.ones(6), "b.10.weight": random(4, 6),
         "b.2.weight": random(5, 4)}  # fmt: skip
OPTIMIZER = {"state": {0: {"exp_avg": random(9, 9)}}, "param_groups": [{"lr": 0.1}]}
SHAPES: dict[str, Any] = {
    "state": STATE,
    "state_dict": {"state_dict": STATE, "epoch": 3, "optimizer": OPTIMIZER},
    "model": {"optimizer": OPTIMIZER, "model": STATE},
    "unknown key": {"optimizer": OPTIMIZER, "student": STATE},
    "a matrix beside it": {"confusion": random(9, 9), "model": STATE},
    "a vector beside it": {"lr": {"last": torch.ones(2)}, "student": STATE},
    "an optimizer beside it": {"adam": OPTIMIZER, "student": STATE},
    "twice": {"checkpoint": {"model": {"state_dict": STATE}}},
    "ddp": {f"module.{name}": tensor for name, tensor in STATE.items()},
    "compiled": {f"_orig_mod.{name}": tensor for name, tensor in STATE.items()},
    "both": {"model": {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}},
    "inside": {name.replace(".", "._orig_mod.", 1): tensor for name, tensor in STATE.items()},
    "parameters": {name: nn.Parameter(tensor) for name, tensor in STATE.items()},
}


def weights(path: Path) -> dict[str, tuple[int, ...]]:
    return {spectrum.name: spectrum.shape for spectrum in file_spectra(path)}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("ending", ["bin", "pt", "pth", "ckpt"])
def test_the_model_is_found(kind: str, ending: str, tmp_path: Path) -> None:
    torch.save(SHAPES[kind], tmp_path / f"m.{ending}")
    found = weights(tmp_path / f"m.{ending}")
    assert list(found.items()) == [("a", (6, 5)), ("b.2", (5, 4)), ("b.10", (4, 6))]


@pytest.mark.parametrize("kind", ["ddp", "compiled", "inside"])
def test_names_of_wrappers_in_safetensors(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "1.safetensors"
    save_file(SHAPES[kind], path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES[kind], path.name)}))
    for place in (path, index):
        assert weights(place) == {"a": (6, 5), "b.2": (5, 4), "b.10": (4, 6)}


def test_several_models_are_all_read(tmp_path: Path) -> None:
    torch.save({"G": STATE, "D": {"a.weight": random(3, 7)}, "opt": OPTIMIZER}, tmp_path / "m.pt")
    found = weights(tmp_path)
    assert found == {"G.a": (6, 5), "G.b.2": (5, 4), "G.b.10": (4, 6), "D.a": (3, 7)}


def test_tied_weights_are_read_once(tmp_path: Path) -> None:
    tied = random(6, 5)
    torch.save({"a.weight": tied, "b.weight": tied, "c.weight": tied.T}, tmp_path / "m.pt")
    assert weights(tmp_path) == {"a": (6, 5), "c": (5, 6)}
    (one,) = survey_files(open_weights(tmp_path)).left_out
    assert (one.name, one.reason) == ("b.weight", "tied: the same tensor as a.weight")


def test_the_state_of_an_optimizer_is_named(tmp_path: Path) -> None:
    torch.save(OPTIMIZER, tmp_path / "m.pt")
    with pytest.raises(DamagedFileError, match="it is the state of an optimizer; name the file of"):
        weights(tmp_path)


def test_a_mapped_file_is_not_written_to(tmp_path: Path) -> None:
    """Each layout that computes a weight, read twice from one mapping."""
    state = {"s.weight": random(6, 5), "s.weight_scale": torch.rand(6),
             "n.weight_g": torch.ones(6, 1), "n.weight_v": random(6, 5),
             "p.weight_orig": random(6, 5), "p.weight_mask": torch.ones(6, 5),
             "e.experts": torch.rand(2, 6, 5)}  # fmt: skip
    model = dr.apply_plan(layer := nn.Sequential(nn.Linear(5, 6)), {"0": dr.Adapted(2)}) and layer
    torch.save(state | model.state_dict(), tmp_path / "m.pt")
    files = open_weights(tmp_path)
    for weight in stored_weights(files):
        first, second = (read_spectrum(files, weight).values for _ in range(2))
        assert first is not None and second is not None and torch.equal(first, second)


def test_names_that_would_collide_stay_as_they_are(tmp_path: Path) -> None:
    both = {"a.weight": random(6, 5), "_orig_mod.a.weight": random(5, 4)}
    save_file(both, tmp_path / "m.safetensors")
    assert weights(tmp_path) == {"a": (6, 5), "_orig_mod.a": (5, 4)}


def test_the_format_before_zip_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert weights(tmp_path) == {"a": (6, 5), "b.2": (5, 4), "b.10": (4, 6)}


@pytest.mark.parametrize("remapped", [0, 1 << 30])
def test_values_are_those_that_were_saved(
    remapped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_files, "_REMAPPED", remapped)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    state = {f"w{i}": random(6, 5).to(dtype) for i, dtype in enumerate(dtypes)}
    torch.save(state | {"t": random(5, 6).T}, tmp_path / "m.pt")
    for spectrum, saved in zip(
        file_spectra(tmp_path), [*state.values(), random(5, 6).T], strict=True
    ):
        expected = torch.linalg.svdvals(saved.double())
        torch.testing.assert_close(spectrum.values, expected, rtol=0, atol=1e-6)


def test_a_sharded_folder_is_read(tmp_path: Path) -> None:
    names = {"a.weight": "pytorch_model-1.bin", "b.2.weight": "pytorch_model-2.bin"}
    for name, shard in names.items():
        torch.save({name: STATE[name]}, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    torch.save(argparse.Namespace(lr=1), tmp_path / "training_args.bin")
    assert weights(tmp_path) == weights(index) == {"a": (6, 5), "b.2": (5, 4)}


def test_what_would_run_code_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1)}, tmp_path / "m.pt")
    told = r"m\.pt cannot be read: .*argparse\.Namespace.*could run code; .*model\.state_dict\(\)"
    with pytest.raises(DamagedFileError, match=told):
        weights(tmp_path / "m.pt")
    torch.save(nn.Linear(3, 3), tmp_path / "m.pt")
    with pytest.raises(DamagedFileError, match=r"Linear.*could run code"):
        weights(tmp_path / "m.pt")


WRONG: dict[str, Any] = {"a list": [1, 2], "a number": 3, "no tensors": {"lr": 0.1}}


@pytest.mark.parametrize("kind", WRONG)
def test_what_holds_no_tensors_is_refused(kind: str, tmp_path: Path) -> None:
    torch.save(WRONG[kind], tmp_path / "m.pt")
    with pytest.raises(DamagedFileError, match=r"m\.pt cannot be read: it holds no dictionary"):
        weights(tmp_path / "m.pt")


DAMAGED = {
    "pickle": b"\x80\x02cos\nsystem\n(S'touch harmed'\ntR.",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "empty pickle": b"\x80\x02.",
    "cut": None,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused_in_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DAMAGED[kind]
    if data is None:
        torch.save(STATE, tmp_path / "whole")
        data = (tmp_path / "whole").read_bytes()[:-200]
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"m\.pt cannot be read: ") as error:
        weights(tmp_path / "m.pt")
    assert str(error.value).isprintable() and len(str(error.value)) < 600
    assert not (tmp_path / "harmed").exists()


@pytest.mark.filterwarnings("ignore:.*deprecated.*:UserWarning")
def test_quantized_and_sparse_tensors_are_left_out(tmp_path: Path) -> None:
    from stored import left_out

    state: dict[str, Tensor] = {"a.weight": random(6, 5), "s.weight": random(6, 5).to_sparse()}
    state["q.weight"] = torch.quantize_per_tensor(random(6, 5), 0.1, 0, torch.qint8)
    torch.save(state, tmp_path / "m.pt")
    assert weights(tmp_path) == {"a": (6, 5)}
    reasons = {one.name: one.reason for one in left_out(tmp_path)}
    assert "sparse" in reasons["s.weight"] and "quantized" in reasons["q.weight"]
