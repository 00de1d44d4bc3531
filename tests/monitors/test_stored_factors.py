"""Factors in files are multiplied as their layers do: low-rank, adapted, LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stored import assert_weights, left_out, random, write
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, LowRank
from dynarank.monitors.file_spectra import file_spectra

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(20, 16),
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
    "conv2d": lambda: nn.Conv2d(6, 8, 3),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, 3),
    "embedding": lambda: nn.Embedding(20, 12),
    "lstm": lambda: nn.LSTM(6, 8),
    "attention": lambda: nn.MultiheadAttention(16, 2),
}


@pytest.mark.parametrize("decomposition", ["svd", "tucker", "cp", "separable"])
@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapted_layer_is_its_base_and_its_adapter(
    kind: str, decomposition: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"x": LAYERS[kind]()})
    plan = dict.fromkeys(dr.current_plan(model), Adapted(2, decomposition, alpha=5.0))
    dr.apply_plan(model, plan)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    write(tmp_path, model.state_dict())
    sites = {site.path: site for site in dr.survey(model)}
    assert all(isinstance(site.form, Adapted) for site in sites.values())
    assert_weights(tmp_path, {path: site.effective() for path, site in sites.items()})


@pytest.mark.parametrize("kind", ["linear", "lstm", "attention"])
def test_the_plan_of_a_file_is_that_of_its_model(kind: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"x": LAYERS[kind]()})
    write(tmp_path, model.state_dict())
    assert {spectrum.name for spectrum in file_spectra(tmp_path)} == set(dr.current_plan(model))
    dr.apply_plan(model, dict.fromkeys(dr.current_plan(model), LowRank(2)))
    write(tmp_path, model.state_dict())
    assert {spectrum.name for spectrum in file_spectra(tmp_path)} == set(dr.current_plan(model))


LORA = {
    "linear": ((3, 20), (16, 3)),
    "conv": ((3, 6, 3, 3), (8, 3, 1, 1)),
}


def lora(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    down, up = (random(*shape) for shape in LORA[kind])
    product = up.flatten(1).double() @ down.flatten(1).double()
    return down, up, product.reshape(up.shape[0], *down.shape[1:])


@pytest.mark.parametrize("adapter", ["", ".default"])
@pytest.mark.parametrize("kind", LORA)
def test_lora_of_peft_is_the_scaled_product(kind: str, adapter: str, tmp_path: Path) -> None:
    down, up, product = lora(kind)
    stem = "base_model.model.layers.0.q_proj"
    tensors = {f"{stem}.lora_A{adapter}.weight": down, f"{stem}.lora_B{adapter}.weight": up}
    for config, scale in (
        ({"lora_alpha": 12, "r": 3}, 4.0),
        ({"lora_alpha": 12, "r": 3, "use_rslora": True}, 12 / math.sqrt(3)),
        ({"lora_alpha": 12, "r": 3, "alpha_pattern": {"q_proj": 6}}, 2.0),
    ):
        write(tmp_path, tensors, adapter_config=config)
        assert_weights(tmp_path, {"layers.0.q_proj": scale * product})


def test_lora_of_an_embedding_and_of_kohya(tmp_path: Path) -> None:
    down, up, product = lora("linear")
    tensors = {"e.lora_embedding_A": down, "e.lora_embedding_B": up}
    kohya = {"k.lora_down.weight": down, "k.lora_up.weight": up, "k.alpha": torch.tensor(6.0)}
    write(tmp_path, tensors | kohya)
    assert_weights(tmp_path, {"e": product, "k": 2 * product})


def test_dora_is_left_out(tmp_path: Path) -> None:
    down, up, _ = lora("linear")
    tensors = {"x.lora_A.weight": down, "x.lora_B.weight": up, "y.weight": random(4, 4),
               "x.lora_magnitude_vector.weight": torch.ones(16)}  # fmt: skip
    write(tmp_path, tensors)
    assert_weights(tmp_path, {"y": random(4, 4)})
    assert [one.reason for one in left_out(tmp_path)] == [
        "DoRA: its update depends on the weight it adapts"
    ]
