"""Tiny models of transformers, of random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

WORDS = 64


def bert(seed: int = 0, head: type[Any] = BertForSequenceClassification) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}
    return head(BertConfig(vocab_size=WORDS, num_hidden_layers=1, num_labels=4, **sizes, **rates))


def masked(seed: int = 0) -> Any:
    """A model whose output layer is tied to the embeddings, but for its bias."""
    return bert(seed, BertForMaskedLM)


def gpt2(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, **ids}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **sizes, **rates, **more))


def vit(seed: int = 0) -> Any:
    """A model whose files have other names than its parameters, by default."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 8, "patch_size": 4, "num_labels": 4}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=1, **sizes))


MODELS = {"bert": bert, "gpt2": gpt2}
