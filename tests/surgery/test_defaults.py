"""Which weights are left by default, whoever asks: one rule, told by a table of models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import BY_NAME, CLASSES, WORDS, Architecture
from torch import nn

import dynarank as dr
from dynarank import FullRank, LowRank
from dynarank.allocation.rules import candidates
from dynarank.cost.flops import trace
from dynarank.layers import RankedLayer
from dynarank.scheduler.scheduled_layers import scheduled_layers

EMBEDDING, OUTPUT, LAST = "embedding: rows", "output layer", "last linear"
LAST_CONV = "last convolution"


class Net(nn.Module):
    """Children in the order in which they are given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class WithParameter(Net):
    """With a matrix of its own, as a position embedding or class token is."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__(**children)
        self.own = nn.Parameter(torch.zeros(1, 64))


def linear(n: int = 64, m: int = 64) -> nn.Linear:
    return nn.Linear(m, n)


def mlp(*sizes: int) -> nn.Sequential:
    parts = [one for m, n in pairwise(sizes) for one in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


def encoder(depth: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def gpt2(cls: Any, **more: Any) -> nn.Module:
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return cls(hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, **more))


def bert(cls: Any, **more: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return cls(hf.BertConfig(vocab_size=40, intermediate_size=64, **sizes), **more)


class Own(nn.Linear):
    """A class that is not handled."""

    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


# fmt: off
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "mlp": (lambda: mlp(64, 128, 128, 20), {"4": LAST}),
    "like layers": (lambda: mlp(64, 64, 64, 64), {"4": LAST}),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), linear(20)), {"2": LAST}),
    "no linear layer": (
        lambda: nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 3)),
        {"1": LAST_CONV},
    ),
    "one layer": (lambda: nn.Sequential(linear()), {}),
    "a bare layer": (linear, {}),
    "a bare attention": (lambda: nn.MultiheadAttention(64, 4), {}),
    "a bare lstm": (lambda: nn.LSTM(64, 64), {}),
    "head first": (lambda: Net(head=linear(20), body=mlp(64, 64, 64)), {"head": OUTPUT}),
    "fc first": (lambda: Net(fc=linear(20), conv=nn.Conv2d(16, 32, 3)), {"fc": LAST}),
    "a deep head": (
        lambda: Net(classifier=mlp(64, 64, 20), body=linear()), {"classifier.2": OUTPUT},
    ),
    "a convolution as a head": (
        lambda: Net(body=nn.Conv2d(16, 32, 3), classifier=nn.Conv2d(32, 21, 1)),
        {"classifier": OUTPUT},
    ),
    "tasks": (
        lambda: Net(body=linear(), heads=nn.ModuleDict({"a": linear(20), "b": mlp(64, 64, 30)})),
        {"heads.a": OUTPUT, "heads.b.2": OUTPUT},
    ),
    "two heads": (
        lambda: Net(policy_head=linear(20), body=mlp(64, 64, 64), value_head=linear(16)),
        {"policy_head": OUTPUT, "value_head": OUTPUT},
    ),
    "no head but by name": (
        lambda: Net(multi_head_attn=linear(), headroom=linear(), readout_norm=nn.LayerNorm(64)),
        {"headroom": LAST},
    ),
    "a parameter of the model's own": (
        lambda: WithParameter(body=linear(), head=linear(20)),
        {"head": OUTPUT, "own": "too small"},
    ),
    "a wrapper with a parameter": (
        lambda: WithParameter(net=Net(head=linear(20), body=linear())),
        {"net.head": OUTPUT, "own": "too small"},
    ),
    "heads beside the last": (
        lambda: Net(body=mlp(64, 64), age=linear(20), race=linear(30)), {"age": LAST, "race": LAST},
    ),
    "fc before an encoder": (lambda: Net(fc=linear(20), body=encoder(2)), {"fc": LAST}),
    "a convolution after linear layers": (
        lambda: Net(time=linear(), body=nn.Conv2d(16, 32, 3), end=nn.Conv2d(32, 16, 1)),
        {"time": LAST, "end": LAST_CONV},
    ),
    "actor and critic": (
        lambda: Net(critic=mlp(64, 64, 16), actor=mlp(64, 64, 18), body=linear()),
        {"critic.2": OUTPUT, "actor.2": OUTPUT},
    ),
    "an output in a head": (
        lambda: Net(body=linear(), decode_head=Net(classifier=linear(20), fuse=linear())),
        {"decode_head.classifier": OUTPUT},
    ),
    "a head that PEFT copies": (
        lambda: Net(
            body=linear(),
            classifier=Net(
                original_module=linear(20),
                modules_to_save=nn.ModuleDict({"default": linear(20)}),
            ),
        ),
        {"classifier.original_module": OUTPUT, "classifier.modules_to_save.default": OUTPUT},
    ),
    "a dictionary of models": (
        lambda: nn.ModuleDict({"a": mlp(64, 64, 20), "b": Net(head=linear(20), body=linear())}),
        {"a.2": LAST, "b.head": OUTPUT},
    ),
    "a wrapper": (lambda: Net(module=Net(net=mlp(64, 64, 20))), {"module.net.2": LAST}),
    "a head of another class": (
        lambda: nn.Sequential(linear(), linear(), Own(64, 20)), {"2": LAST},
    ),
    "an encoder": (lambda: encoder(2), {}),
    "an encoder of one layer": (lambda: encoder(1), {"layers.0.linear2": LAST}),
    "an encoder and more": (lambda: Net(body=encoder(2), norm=nn.LayerNorm(64)), {}),
    "an encoder and a head": (lambda: Net(body=encoder(2), fc=linear(20)), {"fc": LAST}),
    "a small one beside": (
        lambda: Net(gate=linear(8), body=mlp(64, 64, 64), fc=linear(20)),
        {"gate": "too small: side 8 < 16", "fc": LAST},
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 16, 1)
        ),
        {"0": "too small: side 1 < 16", "2": LAST_CONV},
    ),
    "nothing but small ones": (lambda: mlp(8, 8, 8, 2), {"4": LAST}),
    "embeddings": (
        lambda: Net(embed=nn.Embedding(40, 64), body=linear(), head=linear(20)),
        {"embed": EMBEDDING, "head": OUTPUT},
    ),
    "gpt2": (
        lambda: gpt2(hf.GPT2LMHeadModel),
        {"transformer.wte": EMBEDDING, "transformer.wpe": EMBEDDING},
    ),
    "gpt2 apart": (
        lambda: gpt2(hf.GPT2LMHeadModel, tie_word_embeddings=False),
        {"transformer.wte": EMBEDDING, "transformer.wpe": EMBEDDING, "lm_head": OUTPUT},
    ),
    "gpt2 without a head": (lambda: gpt2(hf.GPT2Model), {"wte": EMBEDDING, "wpe": EMBEDDING}),
    "gpt2 of sequences": (
        lambda: gpt2(hf.GPT2ForSequenceClassification, num_labels=20),
        {"transformer.wte": EMBEDDING, "transformer.wpe": EMBEDDING, "score": OUTPUT},
    ),
    "bert with a pooler": (
        lambda: bert(hf.BertModel),
        {f"embeddings.{n}_embeddings": EMBEDDING for n in ("word", "position", "token_type")}
        | {"pooler.dense": LAST},
    ),
    "inside a user's model": (
        lambda: Net(
            loss=nn.CrossEntropyLoss(), lm=gpt2(hf.GPT2LMHeadModel, tie_word_embeddings=False)
        ),
        {"lm.transformer.wte": EMBEDDING, "lm.transformer.wpe": EMBEDDING, "lm.lm_head": OUTPUT},
    ),
    "beside a user's head": (
        lambda: Net(
            value_head=linear(20, 32), lm=gpt2(hf.GPT2LMHeadModel, tie_word_embeddings=False)
        ),
        {"lm.transformer.wte": EMBEDDING, "lm.transformer.wpe": EMBEDDING, "lm.lm_head": OUTPUT,
         "value_head": OUTPUT},
    ),
}  # fmt: skip
# fmt: on


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left(name: str) -> None:
    make, expected = MODELS[name]
    left = {site.path: site.left_out for site in dr.survey(make()) if site.left_out}
    assert left.keys() == expected.keys()
    assert all(left[path].startswith(why) for path, why in expected.items())


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = linear(), linear(20)

    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


class Says(Raises):
    def get_output_embeddings(self) -> nn.Module:
        return self.body


def test_what_a_model_says_of_its_outputs_counts_unless_it_raises() -> None:
    assert [site.left_out for site in dr.survey(Raises())] == ["", "last linear: taken as output"]
    assert [site.left_out for site in dr.survey(Says())] == ["output layer", ""]


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net(embed=nn.Embedding(40, 64), head=linear(32), gate=linear(8), body=mlp(64, 64, 64))


BODY = ["body.0", "body.2"]


def test_the_same_layers_whoever_asks() -> None:
    plan = dr.current_plan(dr.factorize(net(), 0.5))
    assert [path for path, form in plan.items() if form != FullRank()] == BODY
    schedules = dr.schedules
    for schedule in (schedules.dynamic_rank(0.5), schedules.lora(4), schedules.full_rank()):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert list(dr.RankScheduler(model, optimizer, schedule, 10).layers) == BODY
        assert [s.path for s in scheduled_layers(dr.survey(net()), schedule, 10)] == BODY
    assert list(dr.plan_within(net(), params=0.9)) == BODY
    assert [site.path for site in candidates(net())] == BODY
    assert "body.{0,2} x2" in str(dr.survey(net(), 0.5))


def test_layers_have_the_last_word() -> None:
    for layers in (["head", "embed"], {"head": 4, "embed": 4}):
        rank = layers if isinstance(layers, dict) else 4
        model = dr.factorize(net(), rank, layers=None if rank is layers else layers)  # type: ignore[arg-type]
        plan = dr.current_plan(model)
        assert plan["head"] == plan["embed"] == LowRank(4) and plan["body.0"] == FullRank()
    model = dr.factorize(dr.inflate(model), 2)  # those that had factors
    assert dr.current_plan(model)["head"] == LowRank(2)


def test_a_head_that_cannot_change_form_is_no_obstacle() -> None:
    model = mlp(64, 64, 64, 20)
    nn.utils.parametrizations.weight_norm(model[4])
    assert dr.current_plan(dr.factorize(model, 8)) == {"0": LowRank(8), "2": LowRank(8)}


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_wrapped_weight_is_left_by_default_and_refused_by_name(wrap: str) -> None:
    model = mlp(64, 64, 64, 64, 20)
    getattr(nn.utils.parametrizations, wrap)(model[2])
    for layers in ("*", "2"):
        with pytest.raises(ValueError, match=r"'2': it is wrapped by .*parametrize"):
            dr.factorize(model, 8, layers=layers)
    assert "it is wrapped by" in str(dr.survey(model, 8))
    assert dr.current_plan(dr.factorize(model, 8)).keys() == {"0", "4", "6"}
    with pytest.raises(ValueError, match=r"no layer .* can change form.*parametrize"):
        dr.factorize(nn.Sequential(nn.utils.parametrizations.weight_norm(linear())), 8)


def test_nothing_but_embeddings_can_change_form() -> None:
    model = Net(embed=nn.Embedding(40, 64), own=Own(64, 64))
    with pytest.raises(ValueError, match=r"^no layer that is taken by default can change form"):
        dr.factorize(model, 0.5)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=WORDS, **sizes, decoder_start_token_id=0)
    )


def basic_resnet() -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(**sizes, layer_type="basic", num_labels=CLASSES)
    )


NAMES = ("bert", "gpt2", "llama", "vit", "convnext", "resnet", "wide-resnet", "transformer")
PEOPLE_TRAIN = [
    *(BY_NAME[name] for name in NAMES),
    Architecture("t5", t5, "words"),
    Architecture("basic-resnet", basic_resnet, "images"),
]


@pytest.mark.parametrize("arch", PEOPLE_TRAIN, ids=str)
def test_no_head_and_no_embedding_and_half_the_cost(arch: Architecture) -> None:
    """A training step of the weights chosen costs at most .62 of full rank, at half the entries."""
    model, batch = arch.build(), arch.batch()
    sample = {"input_ids": batch, "decoder_input_ids": batch} if arch.name == "t5" else batch
    use = trace(model, sample)
    dr.factorize(model, 0.5)
    plan = {path: form for path, form in dr.current_plan(model).items() if form != FullRank()}
    low = sum(use.layers[path].flops(form).training for path, form in plan.items())
    full = sum(use.layers[path].flops(FullRank()).training for path in plan)
    assert 0.3 < low / full <= 0.62
    ranked = {m for m in model.modules() if isinstance(m, RankedLayer)}
    heads = {m for m in model.modules() if getattr(m, "out_features", 0) in (CLASSES, WORDS)}
    lookups = {m for m in model.modules() if isinstance(m, nn.Embedding)}
    assert ranked and heads and not ranked & (heads | lookups)


def test_the_docs_show_what_was_recorded() -> None:
    root = Path(__file__).parents[2]
    recorded = root / "benchmarks/selection/results/2026-11-28/defaults.md"
    page = root / "docs/methods/default-layers.md"
    assert recorded.read_text(encoding="utf-8") in page.read_text(encoding="utf-8")
