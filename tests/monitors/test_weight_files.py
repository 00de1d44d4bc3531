"""Which file each weight is in: single files, shards with an index, folders, runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dynarank as dr
from dynarank import LowRank
from dynarank.monitors.file_spectra import file_spectra
from dynarank.monitors.weight_files import open_weights

INDEX = "model.safetensors.index.json"


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
    with pytest.raises(ValueError, match=r"00002-of-00002\.safetensors is not a whole"):
        open_weights(tmp_path)


def test_an_index_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, **{"b.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(ValueError, match=r"does not fit its shards: 'b.weight' should be in model"):
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
    with pytest.raises(ValueError, match=r"index\.json is not a safetensors index"):
        open_weights(tmp_path)


def test_folders_of_runs_and_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        open_weights(tmp_path)
    for run in ("full-rank", "low-rank"):
        (tmp_path / run).mkdir()
        save_file({"a": torch.ones(2, 2)}, tmp_path / run / "model.safetensors")
    with pytest.raises(ValueError, match=r"several runs, name one or two of: .*full-rank, .*low-r"):
        open_weights(tmp_path)
    assert names(tmp_path / "low-rank") == ["a"]
    (tmp_path / "low-rank" / "model.safetensors").unlink()
    (tmp_path / "low-rank" / "records.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="has not reached its end"):
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
