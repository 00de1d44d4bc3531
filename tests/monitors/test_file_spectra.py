from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dynarank as dr
from dynarank.monitors.file_spectra import WeightSpectrum, file_spectra


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def spectra(folder: Path, tensors: dict[str, Tensor]) -> dict[str, WeightSpectrum]:
    path = folder / "model.safetensors"
    save_file(tensors, path)
    listed = list(file_spectra(path))
    assert len({spectrum.name for spectrum in listed}) == len(listed)
    return {spectrum.name: spectrum for spectrum in listed}


def assert_spectrum(spectrum: WeightSpectrum, matrix: Tensor) -> None:
    expected = torch.linalg.svdvals(matrix.double().flatten(1))
    assert spectrum.shape == tuple(matrix.shape)
    assert spectrum.values is not None
    assert spectrum.values.dtype == torch.float64
    assert spectrum.values.shape == expected.shape
    assert (spectrum.values - expected).abs().max() <= 1e-7 * expected[0]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_plain_weights_of_any_floating_type(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a.weight": weight(5, 3, dtype=dtype), "b.c.weight": weight(4, 2, 3, 3, dtype=dtype)}
    found = spectra(tmp_path, tensors)
    assert list(found) == ["a", "b.c"]
    assert_spectrum(found["a"], tensors["a.weight"])
    assert_spectrum(found["b.c"], tensors["b.c.weight"])


def test_a_name_loses_a_trailing_weight_alone(tmp_path: Path) -> None:
    names = ["weight", "a.weight.scale", "embedding", "x.in_proj_weight", "weight.b"]
    found = spectra(tmp_path, {name: weight(3, 4) for name in names})
    assert sorted(found) == sorted(names)


def test_vectors_scalars_and_integers_are_skipped(tmp_path: Path) -> None:
    tensors = {
        "a.weight": weight(4, 3),
        "a.bias": weight(4),
        "norm.num_batches_tracked": torch.tensor(3),
        "quantized": torch.ones(4, 4, dtype=torch.int8),
        "mask": torch.ones(4, 4, dtype=torch.bool),
    }
    assert list(spectra(tmp_path, tensors)) == ["a"]


def test_a_pair_of_factors_is_its_product(tmp_path: Path) -> None:
    down, up = weight(2, 5), weight(6, 2)
    found = spectra(tmp_path, {"x.y.down": down, "x.y.up": up, "x.y.bias": weight(6)})
    assert list(found) == ["x.y"]
    assert_spectrum(found["x.y"], up.double() @ down.double())


def test_a_pair_in_bf16_is_multiplied_in_fp64(tmp_path: Path) -> None:
    down, up = weight(2, 30, dtype=torch.bfloat16), weight(20, 2, dtype=torch.bfloat16)
    values = spectra(tmp_path, {"x.down": down, "x.up": up})["x"].values
    assert values is not None
    assert values[2:].max() <= 1e-12 * values[0]


def test_a_pair_of_convolutions_has_the_kernels_shape(tmp_path: Path) -> None:
    down, up = weight(2, 3, 3, 5), weight(6, 2, 1, 1)
    found = spectra(tmp_path, {"x.down": down, "x.up": up})
    product = up.double().flatten(1) @ down.double().flatten(1)
    assert_spectrum(found["x"], product.reshape(6, 3, 3, 5))


def test_a_saved_model_gives_its_effective_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Flatten())
    dr.factorize(model, 2, layers="0")
    dr.inflate(dr.factorize(model, 3, layers="2"), layers="2")
    found = spectra(tmp_path, model.state_dict())
    assert list(found) == ["0", "2"]
    assert_spectrum(found["0"], model[0].weight.detach())
    assert_spectrum(found["2"], model[2].weight.detach())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["b.weight", "c.up", "c.down"])
def test_a_weight_that_is_not_finite_has_no_values(tmp_path: Path, name: str, bad: float) -> None:
    tensors = {"a": weight(4, 3), "b.weight": weight(5, 3), "c.down": weight(2, 5)}
    tensors["c.up"] = weight(6, 2)
    tensors[name][0, 0] = bad
    found = spectra(tmp_path, tensors)
    assert {spectrum.name for spectrum in found.values() if spectrum.values is None} == {name[0]}
    assert {name: spectrum.shape for name, spectrum in found.items()} == {
        "a": (4, 3),
        "b": (5, 3),
        "c": (6, 5),
    }


def test_the_parts_of_an_adapted_layer_keep_their_names(tmp_path: Path) -> None:
    """The file does not say the adapter's scale, so there is no product to show."""
    tensors = {"x.base": weight(6, 5), "x.down": weight(2, 5), "x.up": weight(6, 2)}
    found = spectra(tmp_path, tensors)
    assert {name: spectrum.shape for name, spectrum in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_a_pair_at_the_root_is_its_product(tmp_path: Path) -> None:
    down, up = weight(2, 5), weight(6, 2)
    (found,) = spectra(tmp_path, {"down": down, "up": up}).values()
    assert_spectrum(found, up.double() @ down.double())


@pytest.mark.parametrize(
    ("down", "up"),
    [((3, 5), (6, 2)), ((2, 5, 3, 3), (6, 2, 3, 3)), ((2,), (6, 2)), ((2, 5), (2,))],
    ids=str,
)
def test_tensors_that_are_no_pair_are_read_one_by_one(
    tmp_path: Path, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    found = spectra(tmp_path, {"x.down": weight(*down), "x.up": weight(*up)})
    shapes = {"x.down": down, "x.up": up}
    expected = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    assert {name: spectrum.shape for name, spectrum in found.items()} == expected


@pytest.mark.parametrize("cut", [0, 4, 30, -1])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"a.weight": weight(4, 3)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read: .*not a complete"):
        list(file_spectra(path))


def test_a_file_of_another_kind_under_this_name_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": weight(4, 3)}, path)
    with pytest.raises(ValueError, match=r"not a complete safetensors.* give it the ending \.pt"):
        list(file_spectra(path))


def test_a_missing_file_and_a_folder_are_errors_that_name_them(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            list(file_spectra(path))


@pytest.mark.parametrize("tensors", [{}, {"a": weight(4), "b": torch.tensor(2.0)}], ids=len)
def test_a_file_without_weights_is_an_error(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors contains no weight of two or more"):
        spectra(tmp_path, tensors)


def test_a_file_of_integers_alone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors contains no weight"):
        spectra(tmp_path, {"a": torch.ones(4, 4, dtype=torch.int64)})
