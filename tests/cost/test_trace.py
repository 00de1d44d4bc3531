"""The costs of any model that runs: on a meta copy, or with real tensors where it has to."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dynarank as dr
from dynarank import Adapted, LowRank
from dynarank.cost import flops
from dynarank.cost.flops import ModelUse, count_flops, trace

transformers = pytest.importorskip("transformers")

VOCABULARY, TOKENS = 96, (4, 16)
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
DECODER = {**ENCODER, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
SPEECH = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
    "mask_time_length": 2,
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128}
GPT2 = {**SPECIAL, "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2}
T5 = {
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
}
CONVNEXT = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
VIT = {**ENCODER, "image_size": 32, "patch_size": 8}
# Model class, configuration, the inputs that its documentation shows.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "BertForSequenceClassification": (ENCODER, "text"),
    "RobertaForSequenceClassification": (ENCODER, "text"),
    "DistilBertForSequenceClassification": (DISTILBERT, "text"),
    "ElectraForSequenceClassification": ({**ENCODER, "embedding_size": 64}, "text"),
    "AlbertForSequenceClassification": ({**ENCODER, "embedding_size": 64}, "text"),
    "DebertaV2ForSequenceClassification": (ENCODER, "text"),
    "MPNetForSequenceClassification": (ENCODER, "text"),
    "GPT2LMHeadModel": (GPT2, "language"),
    "OPTForCausalLM": (
        {**DECODER, "ffn_dim": 64, "word_embed_proj_dim": 64},
        "language",
    ),
    "GPTNeoXForCausalLM": (ENCODER, "language"),
    "LlamaForCausalLM": (DECODER, "language"),
    "MistralForCausalLM": (DECODER, "language"),
    "Qwen2ForCausalLM": (DECODER, "language"),
    "MixtralForCausalLM": ({**DECODER, **EXPERTS, "num_local_experts": 4}, "language"),
    "Qwen2MoeForCausalLM": (
        {**DECODER, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32},
        "language",
    ),
    "T5ForConditionalGeneration": (T5, "sequences"),
    "BartForConditionalGeneration": (BART, "sequences"),
    "ViTForImageClassification": (VIT, "images"),
    "ConvNextForImageClassification": (CONVNEXT, "images"),
    "SwinForImageClassification": (
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
         "window_size": 4},
        "images",
    ),
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "images",
    ),
    "Wav2Vec2ForCTC": ({**ENCODER, **SPEECH}, "speech"),
}  # fmt: skip
FACTORIZED = ["BertForSequenceClassification", "LlamaForCausalLM", "MixtralForCausalLM",
              "T5ForConditionalGeneration", "ViTForImageClassification"]  # fmt: skip


@cache
def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**MODELS[name][0])).train()


def batch(name: str) -> dict[str, Tensor]:
    ids = torch.arange(64).view(TOKENS) % (VOCABULARY - 3) + 3
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    return {
        "text": {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1])},
        "language": {"input_ids": ids, "attention_mask": mask, "labels": ids},
        "sequences": {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :8]},
        "images": {"pixel_values": torch.ones(2, 3, 32, 32)},
        "speech": {"input_values": torch.ones(2, 400), "attention_mask": torch.ones(2, 400).int()},
    }[MODELS[name][1]]


def state(model: nn.Module, sample: Any) -> list[Any]:
    """All that a trace could change."""
    tensors = [*model.state_dict().values(), *(v for v in sample.values())]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    grads = [p.grad for p in model.parameters()]
    rng = [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]
    return [[t.tolist() for t in tensors], hooks, modes, grads, rng]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_with_the_batch_of_their_documentation(name: str) -> None:
    """The trace is what the model runs, and nothing of it is left."""
    model, sample = built(name), batch(name)
    before = state(model, sample)
    use = trace(model, sample, lambda out: out[0].sum())
    assert use.flops({}) == count_flops(model, sample, lambda out: out[0].sum())
    assert use.rest.forward >= 0 and use.flops({}).training > 2 * use.flops({}).forward
    assert any(layer.calls for layer in use.layers.values())
    assert state(model, sample) == before


@pytest.mark.parametrize("name", FACTORIZED)
@pytest.mark.parametrize("form", [LowRank(4), Adapted(4)], ids=str)
def test_a_plan_costs_what_the_factorized_model_runs(name: str, form: Any) -> None:
    model, sample = copy.deepcopy(built(name)), batch(name)
    use = trace(model, sample)
    read = "wo"  # T5 reads the dtype of this weight, for which its factors are joined
    plan = {
        path: form
        for path, layer in use.layers.items()
        if min(layer.shape[:2]) > 8 and not path.endswith(read)
    }
    predicted = use.flops(plan)
    dr.apply_plan(model, plan)
    assert predicted == count_flops(model, sample)


def test_a_mask_changes_no_count() -> None:
    model, sample = built("BertForSequenceClassification"), batch("BertForSequenceClassification")
    ids = {"input_ids": sample["input_ids"]}
    with_mask = trace(model, {**ids, "attention_mask": sample["attention_mask"]})
    assert with_mask == trace(model, ids)
    assert with_mask.flops({}).training == 26_840_064


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_grouped_products_of_experts_count_as_one_product_each(name: str) -> None:
    model, sample = copy.deepcopy(built(name)), batch(name)
    grouped = count_flops(model, sample)
    model.set_experts_implementation("eager")  # type: ignore[operator]
    assert count_flops(model, sample) == grouped == trace(model, sample).flops({})


class OwnState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(1, len(x), 64)
        return self.out(self.rnn(x, (h0, h0))[0][:, -1])


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(16, 16), torch.ones(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale) * torch.tensor([2.0])


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, src_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


class OnItsDevice(nn.Module):
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.device))


class Uncopied(nn.Module):
    """It keeps an output of the last pass, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(5), nn.Dropout())
        self.last = self.inner(torch.randn(3, 5, 16))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x + self.last.sum().item())
        return self.last


class Branching(Constant):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x


PLAIN: list[Callable[[], nn.Module]] = [
    OwnState,
    Constant,
    Causal,
    OnItsDevice,
    Uncopied,
    Branching,
]


@pytest.mark.parametrize("build", [OwnState, Constant, Causal, OnItsDevice, Uncopied, Branching])
def test_plain_models_that_meta_tensors_do_not_allow(build: Callable[[], nn.Module]) -> None:
    model, sample = build(), {"x": torch.ones(3, 5, 16, requires_grad=True)}
    before = state(model, sample)
    use = trace(model, sample)
    assert state(model, sample) == before and sample["x"].grad is None
    assert use.flops({}) == count_flops(model, sample)
    assert state(model, sample) == before and sample["x"].grad is None
    plan = {path: LowRank(2) for path in use.layers}
    predicted = use.flops(plan)
    dr.apply_plan(model, plan)
    assert predicted == count_flops(model, sample) and predicted.training > 0
    assert trace(model, sample).flops({}) == predicted


def test_targets_on_the_cpu() -> None:
    model, x, targets = nn.Linear(16, 4), torch.ones(8, 16), torch.zeros(8, dtype=torch.long)
    use = trace(model, x, lambda out: F.cross_entropy(out, targets))
    assert use.flops({}) == count_flops(model, x)


class Nets(nn.Module):
    """Attention, recurrent layers and convolutions, which fused kernels compute on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.lstm, self.gru = nn.LSTM(16, 16, batch_first=True), nn.GRU(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2)).transpose(1, 2)
        x = self.encoder(self.attention(x, x, x, need_weights=False)[0])
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.gru(self.lstm(x)[0])[0]


def both(monkeypatch: pytest.MonkeyPatch, model: nn.Module, sample: Any) -> list[ModelUse]:
    """The traces on a meta copy and with real tensors."""
    devices: list[str] = []
    record = flops._record_step

    def noted(twin: nn.Module, *rest: Any) -> Any:
        devices.append(next(twin.parameters()).device.type)
        return record(twin, *rest)

    def refused(self: nn.Module, device: str) -> nn.Module:
        raise NotImplementedError(device)

    monkeypatch.setattr(flops, "_record_step", noted)
    on_meta = trace(model, sample)
    monkeypatch.setattr(nn.Module, "to", refused)
    real = trace(model, sample)
    assert devices == ["meta", "cpu"]
    return [on_meta, real]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_meta_and_real_tensors_give_the_same_trace(
    monkeypatch: pytest.MonkeyPatch, training: bool, frozen: bool
) -> None:
    model = Nets().train(training).requires_grad_(not frozen)
    on_meta, real = both(monkeypatch, model, torch.ones(3, 5, 16))
    assert on_meta == real
    assert on_meta.flops({}) == count_flops(model, torch.ones(3, 5, 16))


@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",
        "DistilBertForSequenceClassification",
        "ViTForImageClassification",
        "ConvNextForImageClassification",
        "SwinForImageClassification",
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "T5ForConditionalGeneration",
    ],
)
def test_meta_and_real_transformers_give_the_same_trace(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sample = {k: v for k, v in batch(name).items() if k != "attention_mask"}
    on_meta, real = both(monkeypatch, built(name), sample)
    assert on_meta == real


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("build", [Nets, OwnState])
def test_under_inference_mode_and_autocast(
    build: Callable[[], nn.Module], context: Callable[[], Any]
) -> None:
    model, x = build(), torch.ones(3, 5, 16)
    expected = trace(model, x)
    with context():
        assert trace(model, torch.ones(3, 5, 16)) == expected
        assert count_flops(model, torch.ones(3, 5, 16)) == expected.flops({})
    with torch.autocast("cpu", torch.bfloat16):
        assert trace(model, x) == expected
        assert count_flops(model, x) == expected.flops({})


def test_the_users_own_error_is_raised_as_it_is() -> None:
    """Without the failed attempt on the meta copy as its context."""
    model = OwnState()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"input\.size.*16") as caught:
        trace(model, torch.ones(3, 5, 15))
    assert caught.value.__context__ is None
    with pytest.raises(ValueError, match="does not take the batch"):
        trace(model, {"y": torch.ones(1)})
    with pytest.raises(RuntimeError, match="meta"):
        trace(OwnState().to("meta"), torch.ones(3, 5, 16))
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


def test_an_interrupt_is_no_reason_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Uncopied):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyboardInterrupt

    model, sample = Interrupted(), {"x": torch.ones(3, 5, 16)}
    before, kernels = state(model, sample), torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyboardInterrupt):
        trace(model, sample)
    assert state(model, sample) == before
    assert torch.backends.mha.get_fastpath_enabled() == kernels


class Checkpointed(nn.Module):
    """Recomputes its first layers in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
        self.head, self.reentrant = nn.Linear(16, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.inner(x))
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_what_a_checkpointed_block_recomputes_follows_the_plan(reentrant: bool | None) -> None:
    model, x = Checkpointed(reentrant), torch.randn(8, 16, requires_grad=True)
    plan = {"inner.0": LowRank(4), "inner.2": LowRank(4)}
    predicted = trace(model, x).flops(plan)
    dr.apply_plan(model, plan)
    assert predicted == count_flops(model, x)
