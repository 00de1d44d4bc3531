"""The architectures that everything must work on, tiny and with random weights. A new one is a row.

Each has a batch, and the logits and targets of its loss (cross-entropy).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from dynarank.train.wide_resnet import WideResNet

WORDS, LENGTH, CLASSES, SIZE, BATCH = 40, 6, 5, 16, 4


@dataclass(frozen=True)
class Architecture:
    """A model, and how to call it.

    Args:
        name: of the row.
        make: a fresh model.
        kind: of its inputs, ``"words"`` or ``"images"``.
        tied: paths of modules that share one weight.
    """

    name: str
    make: Callable[[], nn.Module]
    kind: str
    tied: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        """The model with the weights of a fixed seed."""
        torch.manual_seed(0)
        return self.make()

    def batch(self) -> Tensor:
        """Words (batch, length) or images (batch, 3, size, size)."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "words":
            return torch.randint(1, WORDS, (BATCH, LENGTH), generator=generator)
        return torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)

    def logits(self, model: Callable[[Tensor], Any], batch: Tensor) -> Tensor:
        """(..., classes)."""
        found = model(batch)
        return found if isinstance(found, Tensor) else found.logits

    def loss(self, model: Callable[[Tensor], Any], batch: Tensor) -> Tensor:
        """Of targets that can be learned by heart."""
        logits = self.logits(model, batch).flatten(0, -2)
        return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])


class Seq2Seq(nn.Module):
    """``nn.Transformer`` from words to words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.body = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
        self.head = nn.Linear(32, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        return self.head(self.body(x, x.flip(1)))


class LSTMClassifier(nn.Module):
    """A bidirectional LSTM of two layers over embedded words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.lstm = nn.LSTM(32, 24, 2, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(48, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(words))
        return self.head(torch.relu(self.hidden(states.mean(1))))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=16,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
            eos_token_id=0, tie_word_embeddings=True,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=SIZE, patch_size=4, num_labels=CLASSES,
        )
    )  # fmt: skip


def convnext() -> nn.Module:
    return hf.ConvNextForImageClassification(
        hf.ConvNextConfig(
            num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], patch_size=2, num_labels=CLASSES
        )
    )


def resnet() -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], num_labels=CLASSES)
    )


ARCHITECTURES = [
    Architecture(
        "bert", bert, "words", ("bert.embeddings.word_embeddings", "cls.predictions.decoder")
    ),
    Architecture("gpt2", gpt2, "words", ("transformer.wte", "lm_head")),
    Architecture("llama", llama, "words"),
    Architecture("vit", vit, "images"),
    Architecture("convnext", convnext, "images"),
    Architecture("resnet", resnet, "images"),
    Architecture("wide-resnet", lambda: WideResNet(10, 1, CLASSES), "images"),
    Architecture("transformer", Seq2Seq, "words"),
    Architecture("bilstm", LSTMClassifier, "words"),
]
BY_NAME = {one.name: one for one in ARCHITECTURES}
