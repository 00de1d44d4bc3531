"""Sentences: a small BERT from scratch on SST-2 and MRPC of GLUE.

The test part is the official dev set, since GLUE's test labels are not public. The validation part
is taken from the training rows, always the same, and not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.training.problems.rows import Rows, fixed_order
from dynarank.train.bert import BERT
from dynarank.train.glue_files import read_glue
from dynarank.train.metrics import f1_score
from dynarank.train.sentences import Sentences
from dynarank.train.wordpiece import WordPiece

_PIECES = 4096
_RUN = 4  # words in a row that make two sentences overlap


class Classified(Rows):
    """Sentences or pairs of them in two classes, as tokens of one length, and a small BERT.

    It has no dropout, so that all arms of a seed differ in nothing but the form of their layers.

    Args:
        parts: tokens, segments and labels of "train", "valid" and "test".
        pieces: the size of the vocabulary.
        epochs: the length of the training.
    """

    layers, batch_size, rate = "blocks.*", 32, 0.001
    width, depth, heads = 96, 2, 4

    def __init__(self, parts: Mapping[str, Sequence[Tensor]], pieces: int, epochs: int) -> None:
        self.pieces, self.length = pieces, parts["train"][0].shape[1]
        super().__init__(parts, epochs)

    def network(self, width: float = 1.0) -> nn.Module:
        """A BERT."""
        sides = {"width": self.heads * round(self.width * width / self.heads), "heads": self.heads}
        return BERT(self.pieces, self.length, 2, **sides, depth=self.depth, dropout=0.0)

    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """The logits."""
        with self.precision():
            return model(*inputs).float()


class SST2(Classified):
    """The sentiment of film reviews: one pass over 24,000 phrases, tested on 872 sentences.

    Training rows are phrases of the same sentences again and again, so that rows drawn at random
    would be known from training. The validation rows are 1,000 of at least 15 words, as the
    sentences of the test are long; training rows with four words in a row of one are left out.
    """

    calibrated_on = 8

    def __init__(self, data: Path, rows: int = 24_000, epochs: int = 1) -> None:
        found = read_glue("sst2", data)
        train, valid = separate(found.train, rows, 1000)
        parts = {"train": train, "valid": valid, "test": found.test}
        super().__init__(*tokenized(parts, length=32), epochs)


class MRPC(Classified):
    """Whether two sentences say the same, as two thirds of the pairs do.

    3,168 pairs to train on, 500 to validate, 408 to test. There is little to learn from so few.
    """

    def __init__(self, data: Path, valid: int = 500, epochs: int = 2) -> None:
        found = read_glue("mrpc", data)
        order = fixed_order(len(found.train))
        train, held = found.train.take(order[valid:]), found.train.take(order[:valid])
        parts = {"train": train, "valid": held, "test": found.test}
        super().__init__(*tokenized(parts, length=64), epochs)

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Loss, accuracy and F1."""
        f1 = 100 * f1_score(outputs.argmax(-1), targets)
        return {**super().score(outputs, targets), "f1": f1}


def tokenized(
    parts: Mapping[str, Sentences], length: int
) -> tuple[dict[str, tuple[Tensor, ...]], int]:
    """Tokens, segments and labels of each part, by a vocabulary of the training part.

    Returns:
        The parts, and the size of the vocabulary.
    """
    words = WordPiece.from_texts(parts["train"].texts(), length, size=_PIECES)
    encoded = {
        name: (*words.encode(part), torch.from_numpy(part.labels)) for name, part in parts.items()
    }
    return encoded, words.size


def separate(sentences: Sentences, train: int, valid: int) -> tuple[Sentences, Sentences]:
    """Rows to train on and long rows to validate, without four words in a row in common."""
    order = fixed_order(len(sentences)).tolist()
    words = [text.split() for text in sentences.first]
    held = list(islice((row for row in order if len(words[row]) >= 15), valid))
    known = {run for row in held for run in _runs(words[row])}
    others = (row for row in order if not known.intersection(_runs(words[row])))
    chosen = list(islice(others, train))
    return sentences.take(np.array(chosen)), sentences.take(np.array(held))


def _runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}
