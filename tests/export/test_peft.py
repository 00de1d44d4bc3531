"""Adapters to PEFT and back: the same outputs, the same factors, or a refusal that says why."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key, match_target_against_key
from process_pool import Pools
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers.pytorch_utils import Conv1D

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.export import peft as exchange
from dynarank.export import peft_folder
from dynarank.export.peft_config import config_of
from dynarank.schedules.phases import Phases
from dynarank.surgery.sites import survey

# PEFT's own: it says so of every grouped convolution, of a base whose weights are tied, and where
# one adapter has layers of both layouts. Torch's of asymmetric padding, and of its own modules.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True"),
]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def images(channels: int, dims: int) -> Tensor:
    return torch.randn(2, channels, *(6,) * dims)


# A layer, its input, and the rank of its adapter in PEFT (of all groups together).
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "linear": (lambda: nn.Linear(12, 8), lambda: torch.randn(3, 12), 3),
    "no bias": (lambda: nn.Linear(12, 8, bias=False), lambda: torch.randn(3, 12), 3),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), lambda: images(4, 1), 3),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (1, 2), (1, 0)), lambda: images(4, 2), 3),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, padding=1), lambda: images(4, 3), 3),
    "same": (lambda: nn.Conv2d(4, 6, 4, padding="same"), lambda: images(4, 2), 3),
    "groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), lambda: images(6, 2), 6),
    "depthwise": (lambda: nn.Conv1d(6, 12, 3, groups=6), lambda: images(6, 1), 6),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1, dilation=2), lambda: images(4, 2), 3),
    "no padding": (lambda: nn.Conv2d(4, 6, 3, padding_mode="circular"), lambda: images(4, 2), 3),
    "embedding": (lambda: nn.Embedding(12, 8, padding_idx=0), lambda: torch.arange(12), 3),
    "hf conv1d": (lambda: Conv1D(8, 12), lambda: torch.randn(3, 12), 3),
}


def filled(model: nn.Module, seed: int = 1) -> Any:
    """The model with an adapter that does something."""
    g = torch.Generator().manual_seed(seed)
    for site in survey(model):
        for factor in site.factors():
            drawn = torch.randn(factor.shape, generator=g, dtype=torch.float64) / 4
            factor.data.copy_(drawn)
    return model


def adapted(model: nn.Module, forms: Mapping[str, Adapted] | Adapted) -> Any:
    plan = forms if isinstance(forms, Mapping) else {site.path: forms for site in survey(model)}
    dr.apply_plan(model, plan)
    return filled(model)


def mlp(*names: str) -> Any:
    model = nn.Sequential()
    for name in names or ("0", "1", "2"):
        model.add_module(name, nn.Linear(8, 8))
    return model


def in_peft(base: nn.Module, folder: Path) -> Any:
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()  # type: ignore[arg-type]


def close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((one - other).abs().max() <= tolerance * (1 + other.abs().max()))


def values(model: nn.Module) -> dict[str, Tensor]:
    """All but what is noted beside the forms, such as the norms of factors when they were made."""
    state = model.state_dict().items()
    return {k: v.detach().clone() for k, v in state if not k.endswith("saved_forms")}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def written(folder: Path, model: nn.Module, **config: Any) -> Any:
    """A PEFT model whose adapter does something, saved by PEFT."""
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**config))  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(1)
    for p in peft_model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=g) / 4
    peft_model.save_pretrained(str(folder))
    return peft_model.eval()


def edited(folder: Path, **config: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


# There and back


@pytest.mark.parametrize("kind", LAYERS)
def test_peft_computes_what_the_model_computes(kind: str, tmp_path: Path) -> None:
    make, inputs, rank = LAYERS[kind]
    torch.manual_seed(0)
    model: Any = nn.Sequential(make())
    x = inputs()
    groups = getattr(model[0], "groups", 1)
    adapted(model, Adapted(rank // groups, alpha=7.5))
    before, expected = values(model), model(x)
    base = dr.to_peft(model, tmp_path / "a")
    assert equal(values(model), before)
    assert type(base[0]) is type(make())
    assert not close(base(x), expected, 1e-3)
    assert close(in_peft(base, tmp_path / "a")(x), expected)
    back = dr.from_peft(base, tmp_path / "a")
    assert back is base
    assert equal(values(back), before)
    assert back[0].form == model[0].form
    assert dr.check(back) is None


@pytest.mark.parametrize("kind", LAYERS)
def test_what_peft_wrote_becomes_adapted_layers(kind: str, tmp_path: Path) -> None:
    make, inputs, rank = LAYERS[kind]
    torch.manual_seed(0)
    plain: Any = nn.Sequential(make())
    x = inputs()
    fan_in = kind == "hf conv1d"
    how = {"r": rank, "lora_alpha": 5, "target_modules": ["0"], "fan_in_fan_out": fan_in}
    peft_model = get_peft_model(copy.deepcopy(plain), LoraConfig(**how))  # type: ignore[arg-type]
    for name, p in peft_model.named_parameters():
        if "lora" in name:  # of a grouped layer only what has groups: its blocks
            p.data = _in_blocks(torch.randn(p.shape), getattr(plain[0], "groups", 1), name)
    peft_model.save_pretrained(str(tmp_path))
    ours = dr.from_peft(copy.deepcopy(plain), tmp_path)
    assert close(ours(x), peft_model(x))
    again = dr.to_peft(ours, tmp_path / "again")
    assert equal(load_file(tmp_path / TENSORS), load_file(tmp_path / "again" / TENSORS))
    assert close(in_peft(again, tmp_path / "again")(x), peft_model(x))


def _in_blocks(value: Tensor, groups: int, name: str) -> Tensor:
    if groups > 1 and "lora_A" in name:
        rows, columns = (torch.arange(n) * groups // n for n in value.shape[:2])
        value = value * (rows[:, None] == columns).view(*value.shape[:2], *(1,) * (value.ndim - 2))
    return value


def test_a_factor_that_joins_groups_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    written(tmp_path, model, r=2, target_modules=["0"])
    with pytest.raises(ValueError, match=r"layer '0'.*joins channels of several of its 2 groups"):
        dr.from_peft(model, tmp_path)


def test_full_rank_layers_are_part_of_the_base(tmp_path: Path) -> None:
    model = adapted(mlp(), {"0": Adapted(2), "1": Adapted(3)})
    x = torch.randn(2, 8)
    dr.inflate(model, layers="1")
    base = dr.to_peft(model, tmp_path)
    assert torch.equal(base[1].weight, model[1].weight)
    assert close(in_peft(base, tmp_path)(x), model(x))


# Names


def _others(path: str) -> list[str]:
    return [f"1{path}", f"{path}1", f"x.{path}", f"{path}.x", f"x{path}", path[1:], f"{path}\n"]


_NAMES = st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1)
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map(".".join)


@given(st.lists(_PATHS, min_size=2, max_size=4, unique=True))
@settings(max_examples=60, deadline=None)
def test_a_pattern_means_its_layer_and_no_other(paths: list[str]) -> None:
    layers = {path: (i + 1, float(i + 5)) for i, path in enumerate(paths)}
    config = config_of(layers)
    known = [*paths, *(other for path in paths for other in _others(path))]
    for path in known:
        rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], path))
        alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"], path))
        wanted = layers.get(path, (config["r"], config["lora_alpha"]))
        assert (rank or config["r"], alpha or config["lora_alpha"]) == wanted
        targeted = match_target_against_key(config["target_modules"], path) is not None
        assert targeted == (path in layers)


def test_names_that_end_alike_or_read_as_patterns(tmp_path: Path) -> None:
    names = (
        "0",
        "10",
        "fc",
        "afc",
        "a|b",
        "a",
        "f(c)+",
        "[",
        "q\\d",
        "lora_A",
        "all-linear",
        "é x",
    )
    inner, model = mlp(*names), nn.Sequential()
    model.add_module("fc", inner)
    model.add_module("c", mlp(*names))
    ranks = {f"fc.{name}": i % 7 + 1 for i, name in enumerate(names) if i % 2 == 0}
    ranks |= {"c.0": 2, "c.fc": 5, "c.a": 1}
    adapted(model, {path: Adapted(r, alpha=3.0 * r + 1) for path, r in ranks.items()})
    x = torch.randn(3, 8)
    base = dr.to_peft(model, tmp_path)
    loaded = in_peft(base, tmp_path)
    assert close(loaded(x), model(x))
    found = [n for n, m in loaded.named_modules() if hasattr(m, "lora_A") and hasattr(m, "r")]
    assert {n.removeprefix("base_model.model.") for n in found} == ranks.keys()
    assert equal(values(dr.from_peft(base, tmp_path)), values(model))


# What else PEFT's configurations say

TAKEN: dict[str, dict[str, Any]] = {
    "patterns": {"r": 2, "rank_pattern": {"^0": 3, "2": 1}, "alpha_pattern": {"1|2": 5}},
    "rslora": {"r": 3, "use_rslora": True},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 2, "init_lora_weights": "orthogonal"},
    "bias": {"r": 2, "bias": "all"},
    "bias of adapted layers": {"r": 2, "bias": "lora_only"},
    "other layers": {"r": 2, "target_modules": ["1"], "modules_to_save": ["0"]},
    "excluded": {"r": 2, "target_modules": r"\d", "exclude_modules": ["1"]},
    "linear": {"r": 2, "target_modules": "all-linear"},
    "above the limit": {"r": 12},
}


@pytest.mark.parametrize("name", TAKEN)
def test_configurations_that_are_taken_over(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, x = mlp(), torch.randn(4, 8)
    peft_model = written(tmp_path, plain, **{"target_modules": ["0", "1", "2"]} | TAKEN[name])
    ours = dr.from_peft(copy.deepcopy(plain), tmp_path)
    assert close(ours(x), peft_model(x), 2e-6)
    assert dr.check(ours) is None
    live = dr.from_peft(peft_model)
    assert close(live(x), peft_model(x), 2e-6)
    base = dr.to_peft(ours, tmp_path / "again")
    assert close(in_peft(base, tmp_path / "again")(x), peft_model(x), 2e-6)


def test_an_adapter_of_zeros_above_the_limit_can_still_train(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 4))
    get_peft_model(copy.deepcopy(model), LoraConfig(r=8, target_modules=["0"])).save_pretrained(  # type: ignore[arg-type]
        str(tmp_path)
    )
    x = torch.randn(3, 8)
    expected = model(x)
    ours = dr.from_peft(model, tmp_path)
    assert ours[0].form.rank == 4
    assert close(ours(x), expected)
    ours(x).square().sum().backward()
    assert any(bool(p.grad.any()) for p in (ours[0].down, ours[0].up))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora=True.*merge_and_unload"),
    "lora bias": ({"lora_bias": True}, "lora_bias=True"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' may change the base"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora' may change the base"),
    "rslora with patterns": (
        {"use_rslora": True, "rank_pattern": {"0": 3}},
        "use_rslora=True beside rank_pattern",
    ),
    "replicated": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["0.weight"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "activated": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "of the future": ({"use_tomorrow": {"a": 1}}, "use_tomorrow"),
    "another method": ({"peft_type": "LOHA"}, "peft_type is LOHA"),
    "rank": ({"r": 4}, r"layer '0'.*lora_A.weight is \(2, 8\), and has to be \(4, 8\)"),
    "alpha": ({"lora_alpha": -1}, "alpha of '0' is -1"),
    "pattern": ({"rank_pattern": {"(": 2}}, "is no regular expression"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_refused_by_name(name: str, tmp_path: Path) -> None:
    config, message = REFUSED[name]
    model = mlp("0", "1")
    written(tmp_path, model, r=2, target_modules=["0", "1"])
    edited(tmp_path, **config)
    before, kinds = values(model), [type(m) for m in model]
    with pytest.raises(ValueError, match=message):
        dr.from_peft(model, tmp_path)
    assert equal(values(model), before)
    assert [type(m) for m in model] == kinds


@pytest.mark.parametrize("kind", ["LoHa", "IA3", "OFT"])
def test_other_methods_are_refused(kind: str, tmp_path: Path) -> None:
    more = {"oft_block_size": 4, "r": 0} if kind == "OFT" else {}
    more |= {"feedforward_modules": []} if kind == "IA3" else {}
    config = getattr(peft, f"{kind}Config")(target_modules=["0"], **more)
    live: Any = get_peft_model(mlp(), config)  # type: ignore[arg-type]
    live.save_pretrained(str(tmp_path))
    for model, folder in ((mlp(), tmp_path), (live, None)):
        with pytest.raises(ValueError, match=rf"peft_type is {kind.upper()}, only LORA"):
            dr.from_peft(model, folder)


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("0.lora_B.weight", None, r"layer '0'.*its adapter has .lora_A.weight, not"),
        ("0.lora_A.weight", torch.full((2, 8), torch.nan), "not finite"),
        ("9.lora_A.weight", torch.ones(2, 8), "the model has no layer '9'"),
        ("0.other", torch.ones(2), "a tensor '0.other', the model has none"),
        ("0.bias", torch.ones(2), r"'0.bias' is \(2,\), the model's is \(8,\)"),
    ],
)
def test_tensors_that_do_not_fit(
    key: str, value: Tensor | None, message: str, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = f"base_model.model.{key}"
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    model = mlp("0", "1")
    written(tmp_path, model, r=2, target_modules=["0", "1"])
    damaged(tmp_path, change)
    before = values(model)
    with pytest.raises(ValueError, match=message):
        dr.from_peft(model, tmp_path)
    assert equal(values(model), before)
    assert type(model[0]) is nn.Linear


def test_a_failure_in_the_middle_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp("0", "1")
    written(tmp_path, model, r=2, target_modules=["0"], bias="all")
    before = values(model)

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exchange, "change_forms", fails)
    with pytest.raises(KeyboardInterrupt):
        dr.from_peft(model, tmp_path)
    assert equal(values(model), before)


def test_dropout_is_said_not_to_be_taken_over(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(2, 8)
    peft_model = written(tmp_path, model, r=2, target_modules=["0"], lora_dropout=0.25)
    with pytest.warns(UserWarning, match="lora_dropout=0.25") as told:
        ours = dr.from_peft(model, tmp_path)
    assert told[0].filename == __file__
    assert close(ours(x), peft_model(x))


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"])).save_pretrained(  # type: ignore[arg-type]
        str(tmp_path), safe_serialization=False
    )
    with pytest.raises(ValueError, match=r"adapter_model.bin, which is a pickle"):
        dr.from_peft(mlp(), tmp_path)
    with pytest.raises(FileNotFoundError):
        dr.from_peft(mlp(), tmp_path / "nothing")


# Layers that PEFT computes in another way


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Reader(nn.Module):
    """Reads a weight past its layer; of another only the dtype, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x.to(self.called.weight.dtype)), self.fc.weight, self.fc.bias)


class Asks(nn.Module):
    """Does what it does by the class of its layer, which PEFT's is not of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu() if isinstance(layer, nn.Linear) else layer(x)
        return x


def test_a_layer_of_which_only_the_dtype_is_read_goes(tmp_path: Path) -> None:
    model, x = adapted(Reader(), {"called": Adapted(2)}), torch.randn(2, 8)
    assert close(in_peft(dr.to_peft(model, tmp_path), tmp_path)(x), model(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT finds the first place only
def test_a_block_in_several_places_is_adapted_in_all(tmp_path: Path) -> None:
    block, x = Block(), torch.randn(2, 8)
    model = adapted(nn.Sequential(block, block), {"0.fc": Adapted(2)})
    base = dr.to_peft(model, tmp_path / "a")
    loaded = in_peft(base, tmp_path / "a")
    assert close(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "b")
    assert equal(values(dr.from_peft(base, tmp_path / "b")), values(model))


ELSEWHERE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "dilation": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), "0", "dilation is (2, 2)"),
    "padding mode": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect")),
        "0",
        "pads by 'reflect'",
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), "0", "ConvTranspose2d"),
    "lstm": (lambda: nn.Sequential(nn.LSTM(8, 8)), "0.weight_ih_l0", "weights of LSTM"),
    "cell": (lambda: nn.Sequential(nn.GRUCell(8, 8)), "0.weight_hh", "weights of GRUCell"),
    "attention": (Attention, "attn.in_proj_weight", "weights of MultiheadAttention"),
    "output of attention": (Attention, "attn.out_proj", "weights of MultiheadAttention"),
    "fused": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16)),
        "0.linear1",
        "in eval mode nn.TransformerEncoderLayer reads its weight",
    ),
    "read": (Reader, "fc", "Reader reads its weight, and PEFT's adapter acts where"),
    "asked": (Asks, "layers.0", "Asks asks for its class, and PEFT's adapter acts where"),
    "shared": (Shared, "a", "in 2 places, of which PEFT would adapt 'a' only"),
    "the model": (lambda: nn.Linear(8, 8), "", "it is the whole model"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_layers_that_peft_computes_in_another_way_are_not_exported(
    name: str, tmp_path: Path
) -> None:
    make, path, message = ELSEWHERE[name]
    model = adapted(make(), {path: Adapted(2)})
    refusal = rf"layer {path!r} cannot be exported to PEFT: .*{re.escape(message)}.*dr\.inflate"
    with pytest.raises(ValueError, match=refusal):
        dr.to_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert isinstance(dict(survey_forms(model))[path], Adapted)


def survey_forms(model: nn.Module) -> list[tuple[str, object]]:
    return [(site.path, site.form) for site in survey(model)]


@pytest.mark.parametrize("name", ["dilation", "padding mode", "fused", "read", "asked", "shared"])
def test_and_their_adapters_are_not_taken_over(name: str, tmp_path: Path) -> None:
    make, path, message = ELSEWHERE[name]
    model = make()
    written(tmp_path, model, r=2, target_modules=[path])
    with pytest.raises(ValueError, match=rf"layer {path!r} cannot take.*{re.escape(message)}"):
        dr.from_peft(model, tmp_path)


def test_an_attention_module_in_peft_is_refused(tmp_path: Path) -> None:
    model = Attention()
    written(tmp_path, model, r=2, target_modules=["attn"])
    with pytest.raises(ValueError, match=r"nn.MultiheadAttention.*merge_and_unload"):
        dr.from_peft(model, tmp_path)


@pytest.mark.parametrize("decomposition", ["tucker", "cp", "separable"])
def test_other_decompositions_are_refused(decomposition: str, tmp_path: Path) -> None:
    model = adapted(nn.Sequential(nn.Conv2d(8, 8, 3)), Adapted(2, decomposition))
    with pytest.raises(ValueError, match=f"its adapter is a {decomposition} one.*dr.inflate"):
        dr.to_peft(model, tmp_path)


def test_low_rank_layers_have_no_base(tmp_path: Path) -> None:
    model = adapted(mlp(), {"0": Adapted(2)})
    dr.apply_plan(model, {"1": LowRank(2)})
    with pytest.raises(ValueError, match=r"layer '1' is LowRank.*dr.inflate.*dr.to_plain"):
        dr.to_peft(model, tmp_path)
    with pytest.raises(ValueError, match=r"no layer of the model is adapted.*dr.deflate"):
        dr.to_peft(dr.merge(model), tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_read_as_a_layer_s_own_are_refused(tmp_path: Path) -> None:
    model = adapted(mlp(), {"0": Adapted(2), "1": Adapted(2)})
    model[2].register_parameter("again", model[0].down)
    with pytest.raises(ValueError, match=r"layer '0' cannot be exported: its down is tied to 2"):
        dr.to_peft(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"layer '0'.*on the meta device"):
        dr.to_peft(adapted(mlp(), {"0": Adapted(2)}).to("meta"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_layer_that_has_factors_already_is_refused(tmp_path: Path) -> None:
    model = mlp()
    written(tmp_path, model, r=2, target_modules=["0", "1"])
    dr.factorize(model, 2, layers="1")
    with pytest.raises(ValueError, match=r"layer '1'.*it is LowRank.*already.*dr.inflate"):
        dr.from_peft(model, tmp_path)
    assert type(model[0]) is nn.Linear
    assert isinstance(dr.from_peft(dr.inflate(model), tmp_path)[1].form, Adapted)


# Tied weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_tied_weights_have_the_adapter_in_each_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = adapted(Tied(), {"embed": Adapted(3)}), torch.arange(12)
    base = dr.to_peft(model, tmp_path)
    assert base.head.weight is base.embed.weight
    assert close(in_peft(base, tmp_path)(x), model(x))
    back = dr.from_peft(base, tmp_path)
    assert back.head.down is back.embed.down
    assert equal(values(back), values(model))


@pytest.mark.parametrize("targets", [["embed"], ["embed", "head"]])
def test_a_tied_weight_with_two_adapters_is_refused(targets: list[str], tmp_path: Path) -> None:
    model = Tied()
    written(tmp_path, model, r=2, target_modules=targets)
    with pytest.raises(ValueError, match="untie"):
        dr.from_peft(model, tmp_path)
    assert model.head.weight is model.embed.weight


# Precision


@pytest.mark.parametrize(
    ("base_dtype", "dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_factors_keep_their_dtype(
    base_dtype: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = adapted(mlp(), Adapted(2)).to(base_dtype)
    for site in survey(model):
        for factor in site.factors():
            factor.data = factor.data.to(dtype)
    x = torch.randn(4, 8, dtype=base_dtype)
    base = dr.to_peft(model, tmp_path)
    back = dr.from_peft(copy.deepcopy(base), tmp_path)
    assert (back[0].base.dtype, back[0].down.dtype) == (base_dtype, dtype)
    assert equal(values(back), values(model))
    assert torch.equal(back(x), model(x))
    tolerance = 0.05 if torch.bfloat16 in (base_dtype, dtype) else 1e-6
    assert close(in_peft(base, tmp_path)(x), model(x), tolerance)
    back(x).square().sum().backward()
    assert back[0].up.grad.dtype == dtype


# Going on


def test_an_imported_model_trains_inflates_and_merges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    model: Any = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    peft_model = written(tmp_path, model, r=2, target_modules=["0"])
    dr.from_peft(model, tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = Phases([0, 2, 4], [Adapted(2, alpha=8.0), FullRank(), Adapted(2)])
    expected = peft_model(x)
    ranks = dr.RankScheduler(model, optimizer, schedule, 6, layers=["0"])
    assert close(model(x), expected)
    forms, losses = [], []
    for _ in range(6):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.step()
        forms.append(type(model[0].form).__name__)
        losses.append(loss.item())
    assert forms == ["Adapted", "FullRank", "FullRank", "Adapted", "Adapted", "Adapted"]
    assert losses[-1] < losses[0]
    y = model(x)
    base = dr.to_peft(model, tmp_path / "again")
    assert close(in_peft(base, tmp_path / "again")(x), y)
    assert close(dr.merge(model)(x), y)


def test_a_run_goes_on_after_an_export(tmp_path: Path) -> None:
    model = adapted(mlp(), Adapted(2))
    base, copied = dr.to_peft(model, tmp_path), dr.merge(copy.deepcopy(model))  # plain again
    schedule = Phases([0, 1], [Adapted(2), FullRank()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ranks = dr.RankScheduler(model, optimizer, schedule, 2, layers="*")
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    ranks.step()
    assert [type(layer) for layer in (*base, *copied)] == [nn.Linear] * 6
    assert model[0].form == FullRank()


def test_frozen_factors_are_exported(tmp_path: Path) -> None:
    model, x = adapted(mlp(), Adapted(2)), torch.randn(2, 8)
    model[0].down.requires_grad_(False)
    base = dr.to_peft(model, tmp_path)
    assert close(in_peft(base, tmp_path)(x), model(x))
    assert all(p.requires_grad for p in base.parameters())


def test_neither_needs_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    model = adapted(mlp(), Adapted(2))
    base = dr.to_peft(model, tmp_path)
    assert equal(values(dr.from_peft(base, tmp_path)), values(model))


def test_wrapped_models(tmp_path: Path) -> None:
    model, x = adapted(mlp(), Adapted(2)), torch.randn(2, 8)
    base = dr.to_peft(nn.DataParallel(torch.compile(model)), tmp_path)  # type: ignore[arg-type]
    assert close(in_peft(base, tmp_path)(x), model(x))
    wrapped: Any = torch.compile(base)
    assert dr.from_peft(wrapped, tmp_path) is wrapped
    assert equal(values(base), values(model))


def test_a_part_that_is_compiled_has_its_plain_path(tmp_path: Path) -> None:
    model = adapted(nn.Sequential(mlp(), nn.Linear(8, 8)), {"0.1": Adapted(2), "1": Adapted(3)})
    x = torch.randn(2, 8)
    expected = model(x)
    model[0] = torch.compile(model[0], backend="eager")
    base = dr.to_peft(model, tmp_path)
    assert close(in_peft(base, tmp_path)(x), expected)


# Live models of PEFT


def test_a_live_peft_model_stays_as_it_is(tmp_path: Path) -> None:
    live, x = written(tmp_path, mlp(), r=2, target_modules=["0", "2"]), torch.randn(3, 8)
    before, expected = values(live), live(x)
    ours = dr.from_peft(live)
    assert equal(values(live), before)
    assert torch.equal(live(x), expected)
    assert close(ours(x), expected)
    assert equal(values(ours), values(dr.from_peft(mlp_like(live), tmp_path)))
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert trained == ["0.down", "0.up", "2.down", "2.up"]


class Scaled(nn.Module):
    """Has names of its own that PEFT's layers have too, as attention of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scaling, self.merged = nn.Linear(8, 8), 0.5, True

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scaling


def test_a_live_model_with_a_scaling_of_its_own(tmp_path: Path) -> None:
    live, x = written(tmp_path, Scaled(), r=2, target_modules=["fc"]), torch.randn(3, 8)
    assert close(dr.from_peft(live)(x), live(x))


def test_a_base_that_peft_has_changed_is_named(tmp_path: Path) -> None:
    base = written(tmp_path, mlp(), r=2, target_modules=["0"]).base_model.model
    with pytest.raises(ValueError, match=r"changes its base in place.*dr\.from_peft\(peft_model\)"):
        dr.from_peft(base, tmp_path)


def mlp_like(live: Any) -> Any:
    return copy.deepcopy(live).unload()


def test_live_models_that_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    live: Any = get_peft_model(mlp(), config)  # type: ignore[arg-type]
    live.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into .*unmerge_adapter"):
        dr.from_peft(live)
    live.unmerge_adapter()
    live.add_adapter("second", config)
    with pytest.raises(ValueError, match=r"has 2 adapters .default, second.*delete_adapter"):
        dr.from_peft(live)
    live.delete_adapter("second")
    live.base_model.model[0].set_scale("default", 3.0)
    with pytest.raises(ValueError, match=r"scaled by .* set_scale"):
        dr.from_peft(live)
    with pytest.raises(
        TypeError, match=r"takes a PeftModel, got Sequential: save .* and the folder"
    ):
        dr.from_peft(mlp())


def test_layers_beneath_peft_adapters_do_not_change_form(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 32))
    live = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    kinds = [type(m) for m in live.modules()]
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    schedule = dr.schedules.dynamic_rank(2, inflate=0.3, deflate=0.7)
    layer = "base_model.model.0.base_layer"
    for change in (
        lambda: dr.factorize(live, 4),
        lambda: dr.deflate(live, 4),
        lambda: dr.apply_plan(live, {layer: LowRank(4)}),
        lambda: dr.RankScheduler(live, optimizer, schedule, total_steps=10),
    ):
        with pytest.raises(ValueError, match=rf"layer '{layer}'.*PEFT adapter.*dr.from_peft"):
            change()
    with pytest.raises(ValueError, match="it is a part of a PEFT adapter"):
        dr.factorize(live, 1, layers="*lora_A*")
    assert [type(m) for m in live.modules()] == kinds
    dr.factorize(live, 4, layers="*.2")
    assert isinstance(model[2].form, LowRank)
    dr.deflate(dr.inflate(live), 4)
    with pytest.raises(ValueError, match=r"PEFT's own adapters: its save_pretrained writes them"):
        dr.to_peft(live, tmp_path / "a")


class Linear4bit(nn.Linear):
    """A stand-in for bitsandbytes' layer."""

    def forward(self, input: Tensor) -> Tensor:
        return input


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(Linear4bit(8, 8))
    written(tmp_path, mlp("0"), r=2, target_modules=["0"])
    with pytest.raises(ValueError, match="layer '0' cannot change form: its class Linear4bit"):
        dr.from_peft(model, tmp_path)


# The folder


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    model, folder = adapted(mlp(), Adapted(2)), tmp_path / "a"
    dr.to_peft(model, folder)
    dr.apply_plan(model, {"1": FullRank()})
    dr.to_peft(model, folder)
    assert len(load_file(folder / TENSORS)) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (folder / "base" / "tokenizer.json").write_text("mine")
    with pytest.raises(ValueError, match=r"something else .*tokenizer.json.*move it away"):
        dr.to_peft(model, folder)
    assert (folder / "base" / "tokenizer.json").read_text() == "mine"
    of_peft = tmp_path / "peft"
    written(of_peft, mlp(), r=2, target_modules=["0"])
    with pytest.raises(ValueError, match="something else than an export"):
        dr.to_peft(model, of_peft)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        dr.to_peft(model, tmp_path / "file")


def test_a_failure_while_it_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = adapted(mlp(), Adapted(2)), tmp_path / "a"
    dr.to_peft(model, folder)
    before = load_file(folder / TENSORS)

    def fails(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(peft_folder, "save_tensors", fails)
    with pytest.raises(OSError, match="no space"):
        dr.to_peft(filled(model, 5), folder)
    assert equal(load_file(folder / TENSORS), before)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_base_is_in_the_folder(tmp_path: Path) -> None:
    model = adapted(mlp(), Adapted(2))
    base = dr.to_peft(model, tmp_path / "a")
    fresh = mlp()
    fresh.load_state_dict(load_file(tmp_path / "a" / "base" / "model.safetensors"))
    assert equal(values(fresh), values(base))
    dr.to_peft(model, tmp_path / "b", base="org/a")
    assert not (tmp_path / "b" / "base").exists()
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["base_model_name_or_path"] == "org/a"


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks
def test_transformers_models_come_with_their_base(tmp_path: Path) -> None:
    from peft import AutoPeftModel

    model, x = gpt2(), torch.arange(6)[None]
    adapted(model, {"transformer.wte": Adapted(2), "transformer.h.0.attn.c_attn": Adapted(3)})
    expected = model(x).logits
    dr.to_peft(model, tmp_path / "a")
    loaded = AutoPeftModel.from_pretrained(str(tmp_path / "a")).eval()
    assert close(loaded(x).logits, expected)
    again = dr.from_peft(gpt2_from(tmp_path / "a" / "base"), tmp_path / "a")
    assert close(again(x).logits, expected)
    assert again.lm_head.down is again.transformer.wte.down


def gpt2_from(folder: Path) -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder).eval()


# Several processes


def in_ddp(folder: Path) -> tuple[bool, bool, list[str]]:
    """Export from DDP, then import into DDP: whether outputs and gradients are alike."""
    torch.manual_seed(0)
    model, x = adapted(mlp(), Adapted(2)), torch.randn(4, 8) + dist.get_rank()
    base = dr.to_peft(DDP(model), folder)
    dist.barrier()
    outputs = close(in_peft(base, folder)(x), model(x))
    wrapped: Any = dr.from_peft(DDP(base), folder)
    wrapped(x).square().sum().backward()
    told: list[Any] = [None, None]
    dist.all_gather_object(told, wrapped.module[0].up.grad)
    files = sorted(path.name for path in folder.parent.iterdir())
    return outputs, torch.equal(*told) and bool(told[0].any()), files


def in_shards(folder: Path, given: Path) -> list[str]:
    found: list[str] = []
    model, plain = adapted(mlp(), Adapted(2)), mlp()
    fully_shard(model)
    fully_shard(plain)
    for call in (lambda: dr.to_peft(model, folder), lambda: dr.from_peft(plain, given)):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.slow
def test_ddp_models_go_there_and_back(processes: Pools, tmp_path: Path) -> None:
    assert processes(2)(in_ddp, tmp_path / "a") == [(True, True, ["a"])] * 2


@pytest.mark.slow
def test_sharded_models_are_refused(processes: Pools, tmp_path: Path) -> None:
    dr.to_peft(adapted(mlp(), Adapted(2)), tmp_path / "given")
    for there, back in processes(2)(in_shards, tmp_path / "a", tmp_path / "given"):
        assert re.search(r"layer '0' .*sharded by fully_shard.*dr\.save.*not sharded", there)
        assert re.search(r"layer '0' .*sharded by fully_shard.*before that", back)
    assert not (tmp_path / "a").exists()
