"""Which tensors are weights, in which order and shape, and what they are in the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stored import assert_weights, left_out, random, write
from torch import Tensor, nn

import dynarank as dr
from dynarank.monitors.stored_weight import natural_order
from dynarank.monitors.stored_weights import role_of, survey_files
from dynarank.monitors.weight_files import open_weights

TRANSPOSED: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.ConvTranspose1d(12, 6, 4),
    "2d": lambda: nn.ConvTranspose2d(64, 4, 3),
    "3d": lambda: nn.ConvTranspose3d(4, 6, 2),
    "grouped": lambda: nn.ConvTranspose2d(12, 8, 3, groups=2),
    "many groups": lambda: nn.ConvTranspose2d(12, 24, 3, groups=4),
    "plain": lambda: nn.Conv2d(6, 8, 3),
    "plain grouped": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "square": lambda: nn.Conv2d(6, 6, 3),
}


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_convolutions_are_matrices_as_in_the_library(kind: str, tmp_path: Path) -> None:
    model = nn.Sequential(TRANSPOSED[kind]())
    write(tmp_path, model.state_dict())
    (site,) = dr.survey(model)
    assert_weights(tmp_path, {"0": site.effective()})


@pytest.mark.parametrize("name", ["upconv_transpose", "deconv", "conv_t.0"])
def test_a_square_transposed_convolution_is_told_by_its_name(name: str, tmp_path: Path) -> None:
    weight = random(6, 6, 3, 3)
    write(tmp_path, {f"{name}.weight": weight, f"{name}.bias": torch.ones(6)})
    assert_weights(tmp_path, {name: weight.transpose(0, 1)})


@pytest.mark.parametrize(("name", "norm"), [("main.3", "main.4"), ("conv2", "bn2")])
def test_without_a_bias_the_norm_tells(name: str, norm: str, tmp_path: Path) -> None:
    weight = random(12, 6, 3, 3)
    write(tmp_path, {f"{name}.weight": weight, f"{norm}.weight": torch.ones(6)})
    assert_weights(tmp_path, {name: weight.transpose(0, 1)})
    write(tmp_path, {f"{name}.weight": weight, f"{norm}.weight": torch.ones(12)})
    assert_weights(tmp_path, {name: weight})


def test_conv1d_of_gpt2_is_turned(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=11, n_head=2, vocab_size=40, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    write(tmp_path, state)
    found = survey_files(open_weights(tmp_path)).weights
    sites = {site.path: site for site in dr.survey(model)}
    assert all(weight.shape == tuple(sites[weight.name].shape) for weight in found)
    blocks = [w.name.split(".")[2] for w in found if ".h." in w.name]
    assert list(dict.fromkeys(blocks)) == [str(i) for i in range(11)]


@pytest.mark.parametrize("turned", [False, True])
def test_conv1d_without_a_bias_is_told_by_its_name(turned: bool, tmp_path: Path) -> None:
    layers = {
        "attn.c_attn": (24, 8),
        "attn.c_proj": (8, 8),
        "mlp.c_fc": (32, 8),
        "mlp.c_proj": (8, 32),
    }
    weights = {f"h.0.{name}": random(*shape) for name, shape in layers.items()}
    write(tmp_path, {f"{n}.weight": w.T if turned else w for n, w in weights.items()})
    assert_weights(tmp_path, weights)


def test_what_is_no_weight_is_passed_over(tmp_path: Path) -> None:
    state = {
        "l.weight": random(6, 5),
        "l.bias": torch.ones(6),
        "h.attn.bias": torch.ones(1, 1, 8, 8),
        "experts.up_bias": torch.ones(4, 6),
        "bn.running_mean": torch.ones(6),
        "position_ids": torch.arange(8)[None],
        "rotary.cos_cached": torch.ones(8, 4),
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "cls_token": torch.ones(1, 1, 6),
        "optimizer.state.0.exp_avg": torch.ones(6, 5),
        "l.exp_avg_sq": torch.ones(6, 5),
    }
    write(tmp_path, state)
    assert_weights(tmp_path, {"l": state["l.weight"]})
    assert left_out(tmp_path) == []


def test_layers_come_in_their_natural_order() -> None:
    names = ["h.0.b", "h.10.a", "h.10.b", "h.2.a", "x10", "x9", "h.0.a", "l_l10", "l_l2"]
    ordered = natural_order(names)
    assert ordered == ["h.0.b", "h.0.a", "h.2.a", "h.10.a", "h.10.b", "x9", "x10", "l_l2", "l_l10"]
    assert natural_order(["9" * 400, "8" * 400])  # no limit of digits is met


@pytest.mark.parametrize(
    ("name", "role"),
    [("model.embed_tokens", "embedding"), ("wte", "embedding"), ("lm_head", "head"),
     ("bert.embeddings.word_embeddings", "embedding"), ("classifier", "head"), ("fc1", ""),
     ("embedding_hidden_mapping_in", ""), ("out", "head"), ("layers.1.fc2", "")],
)  # fmt: skip
def test_embeddings_and_heads_are_marked(name: str, role: str, tmp_path: Path) -> None:
    rows = 30 if name in ("out", "layers.1.fc2") else 20
    write(tmp_path, {f"{name}.weight": random(rows, 8)}, config={"vocab_size": 30})
    files = open_weights(tmp_path)
    (weight,) = survey_files(files).weights
    assert role_of(weight, files) == role


def test_the_last_of_several_layers_of_a_head_is_the_head(tmp_path: Path) -> None:
    write(tmp_path, {f"classifier.{i}.weight": random(20, 20) for i in (0, 3, 10)})
    files = open_weights(tmp_path)
    roles = [role_of(weight, files) for weight in survey_files(files).weights]
    assert roles == ["", "", "head"]


def resnext(groups: int) -> dict[str, Tensor]:
    return {
        "layer1.0.conv1.weight": random(32, 16, 1, 1),
        "layer1.0.conv2.weight": random(32, 32 // groups, 3, 3),
        "layer1.0.conv3.weight": random(64, 32, 1, 1),
    }


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_groups_are_told_by_the_convolution_before(groups: int, tmp_path: Path) -> None:
    write(tmp_path, resnext(groups))
    found = survey_files(open_weights(tmp_path)).weights
    assert [weight.groups for weight in found] == [1, groups, 1]


@pytest.mark.parametrize("config", ["{", "[]", '{"quantization_config": 3, "vocab_size": "x"}'])
def test_a_config_that_says_nothing_is_as_good_as_none(config: str, tmp_path: Path) -> None:
    write(tmp_path, {"l.weight": random(6, 5)})
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "adapter_config.json").write_text(config)
    assert_weights(tmp_path, {"l": random(6, 5)})
