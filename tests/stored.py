"""Files of weights for the tests of what is read from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dynarank.monitors.file_spectra import file_spectra
from dynarank.monitors.stored_weights import LeftOut, survey_files
from dynarank.monitors.weight_files import open_weights


def random(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different size: a scale or norm that is ignored changes every rank metric."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values * torch.logspace(0, -2, shape[0]).view(-1, *(1,) * (len(shape) - 1))


def write(folder: Path, tensors: Mapping[str, Tensor], **configs: object) -> Path:
    """A model in a folder, with JSON files beside it."""
    save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


def left_out(folder: Path) -> list[LeftOut]:
    return survey_files(open_weights(folder)).left_out


def assert_weights(folder: Path, expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    """The weights in a folder have the names, shapes and singular values of these."""
    found = {spectrum.name: spectrum for spectrum in file_spectra(folder)}
    assert sorted(found) == sorted(expected)
    for name, weight in expected.items():
        values = found[name].values
        assert found[name].shape == tuple(weight.shape), name
        wanted = torch.linalg.svdvals(weight.detach().double().flatten(1))
        assert values is not None and values.shape == wanted.shape, name
        assert float((values - wanted).abs().max() / wanted[0]) <= tolerance, name
