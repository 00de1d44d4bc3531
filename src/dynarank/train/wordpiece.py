"""BERT's WordPiece tokenizer, with a vocabulary from a file or trained on the training sentences.

A pair of sentences becomes ``[CLS] first [SEP] second [SEP]``, a single one ``[CLS] first [SEP]``.
Text is lower-cased and stripped of accents, as for BERT's uncased vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarank.files.printable import printable
from dynarank.sinks.extras import import_extra
from dynarank.train.sentences import Sentences
from dynarank.train.sources import DataError, read_utf8

__all__ = ["WordPiece", "find_vocabulary"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PLACES = (".", "vocab", "vocab/bert-base-uncased", "bert-base-uncased")
_SEEN = 2  # the number of times a piece must occur to be learned


class WordPiece:
    """Tokenizes sentences, or pairs of them, to a fixed length.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``; use :meth:`from_file` or :meth:`from_texts`.
        length: the number of tokens per sequence: longer ones are truncated, the longer sentence of
            a pair first; shorter ones are padded with 0.
        source: the origin of the vocabulary.
    """

    def __init__(self, tokenizer: Any, length: int, source: str) -> None:
        parts = _tokenizers()
        tokenizer.post_processor = parts.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
        )
        tokenizer.enable_truncation(length, strategy="longest_first")
        tokenizer.enable_padding(length=length, pad_id=0, pad_token="[PAD]")
        self._tokenizer, self.source = tokenizer, source

    @classmethod
    def from_file(cls, path: Path, length: int, *, size: int) -> WordPiece:
        """Read a ``vocab.txt``: one piece per line, [PAD] first.

        Args:
            path: the file.
            length: the number of tokens per sequence.
            size: the largest number of pieces that the model supports.

        Raises:
            DataError: if the file cannot be read, lacks a special piece, or has too many pieces.
            ImportError: if ``tokenizers`` is not installed.
        """
        parts = _tokenizers()
        lines = read_utf8(path).split("\n")
        pieces = [line.removesuffix("\r") for line in (lines[:-1] if not lines[-1] else lines)]
        _check_pieces(path, pieces, size)
        numbers = {piece: number for number, piece in enumerate(pieces)}
        model = parts.models.WordPiece(numbers, unk_token="[UNK]")
        return cls(_pipeline(parts, model), length, str(path))

    @classmethod
    def from_texts(cls, texts: Sequence[str], length: int, *, size: int) -> WordPiece:
        """Train a vocabulary on texts, deterministically.

        Every piece of more than one character occurs at least twice in them.

        Args:
            texts: the training sentences.
            length: the number of tokens per sequence.
            size: the largest number of pieces.

        Raises:
            ImportError: if ``tokenizers`` is not installed.
        """
        parts = _tokenizers()
        tokenizer = _pipeline(parts, parts.models.WordPiece(unk_token="[UNK]"))
        # By default, the trainer numbers inner characters in an order that differs between runs,
        # and breaks ties between equally frequent pieces by it. An explicit list fixes the order.
        trainer = parts.trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=_SEEN,
            special_tokens=[*SPECIAL, *_inner_characters(tokenizer, texts)],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        model = parts.models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]")
        return cls(_pipeline(parts, model), length, "trained on the training sentences")

    @property
    def size(self) -> int:
        """The number of pieces."""
        return self._tokenizer.get_vocab_size()

    def encode(self, sentences: Sentences) -> tuple[Tensor, Tensor]:
        """Token and segment ids, int64 ``(N, length)`` each; the second sentence is segment 1."""
        second = sentences.second
        texts = list(
            sentences.first if second is None else zip(sentences.first, second, strict=True)
        )
        encoded = self._tokenizer.encode_batch(texts)
        tokens = np.array([one.ids for one in encoded], np.int64)
        segments = np.array([one.type_ids for one in encoded], np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(segments)


def find_vocabulary(place: Path) -> Path | None:
    """The ``vocab.txt`` in a data folder or in its ``vocab/`` or ``bert-base-uncased/``, if any."""
    return next((p for part in _PLACES if (p := place / part / "vocab.txt").is_file()), None)


def _tokenizers() -> Any:
    return import_extra("tokenizers", "text", "a WordPiece tokenizer")


def _pipeline(parts: Any, model: Any) -> Any:
    tokenizer = parts.Tokenizer(model)
    tokenizer.normalizer = parts.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = parts.pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _inner_characters(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """``##x`` for every character x that is not the first of a word."""
    normalize, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    parts = {part for text in texts for part in normalize(text).split()}
    words = (word for part in parts for word, _ in split(part))
    return sorted({f"##{character}" for word in words for character in word[1:]})


def _check_pieces(path: Path, pieces: Sequence[str], size: int) -> None:
    known = set(pieces)
    if missing := [name for name in SPECIAL[:4] if name not in known]:
        raise DataError(
            f"{path} must contain one piece per line, including {', '.join(SPECIAL[:4])}; it lacks "
            f"{', '.join(missing)}: it is a different file"
        )
    if pieces[0] != "[PAD]":
        raise DataError(f"the first line of {path} must be [PAD], but is {printable(pieces[0])!r}")
    if len(known) != len(pieces):
        (twice, _), *_ = Counter(pieces).most_common(1)
        raise DataError(f"{path} contains {printable(twice)!r} twice; pieces must be unique")
    if len(pieces) > size:
        raise DataError(
            f"{path} has {len(pieces):,} pieces and the recipe has room for {size:,}: use a "
            "smaller vocabulary"
        )
