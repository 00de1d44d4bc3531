"""WordPiece: from a file, trained, single sentences and pairs; against transformers' own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dynarank.sinks.extras import install_command
from dynarank.train.sentences import Sentences
from dynarank.train.sources import DataError
from dynarank.train.wordpiece import SPECIAL, WordPiece, find_vocabulary

PIECES = [*SPECIAL, "the", "film", "is", "un", "##want", "##ed", "good", ".", ","]
NUMBER = {piece: number for number, piece in enumerate(PIECES)}


def write(folder: Path, pieces: list[str] = PIECES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return path


def sentences(first: list[str], second: list[str] | None = None) -> Sentences:
    return Sentences(first, second, np.zeros(len(first), np.int64))


def names(row: list[int]) -> str:
    return " ".join(PIECES[number] for number in row)


def test_a_sentence(tmp_path: Path) -> None:
    pieces = WordPiece.from_file(write(tmp_path), 10, size=20)
    tokens, segments = pieces.encode(sentences(["The FILM is\u00a0unwanted.", "zebra"]))
    assert names(tokens[0].tolist()) == "[CLS] the film is un ##want ##ed . [SEP] [PAD]"
    assert names(tokens[1].tolist()) == "[CLS] [UNK] [SEP]" + " [PAD]" * 7
    assert tokens.shape == segments.shape == (2, 10) and not segments.any()
    assert pieces.size == len(PIECES) and str(tmp_path) in pieces.source


def test_a_pair_loses_tokens_of_the_longer_one(tmp_path: Path) -> None:
    pieces = WordPiece.from_file(write(tmp_path), 8, size=20)
    tokens, segments = pieces.encode(sentences(["the the the the the", "good"], ["film", "is ."]))
    assert names(tokens[0].tolist()) == "[CLS] the the the the [SEP] film [SEP]"
    assert segments[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert names(tokens[1].tolist()) == "[CLS] good [SEP] is . [SEP] [PAD] [PAD]"
    assert segments[1].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]


def test_as_transformers_tokenizes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path)
    other = transformers.BertTokenizerFast(vocab=NUMBER, do_lower_case=True)
    first = ["The film, is good.", "unwanted UNWANTED unwanted \u00e9 good the film"]
    second = ["Good film", "is the film unwanted , unwanted ?"]
    tokens, segments = WordPiece.from_file(path, 12, size=20).encode(sentences(first, second))
    wanted = other(first, second, padding="max_length", truncation="longest_first", max_length=12)
    assert tokens.tolist() == wanted["input_ids"]
    assert segments.tolist() == wanted["token_type_ids"]


def test_a_vocabulary_of_the_texts_themselves() -> None:
    texts = ["the film is good", "the film is bad", "an unseen word"] * 3
    trained = [WordPiece.from_texts(texts, 12, size=60) for _ in range(20)]
    assert all(one._tokenizer.get_vocab() == trained[0]._tokenizer.get_vocab() for one in trained)
    tokens = [one.encode(sentences(["the film is good"]))[0] for one in trained]
    assert trained[0].size <= 60 and tokens[0].max() < 60
    assert tokens[0][0, 0] == 2 and tokens[0].count_nonzero() == 6  # whole words and two marks
    assert trained[0]._tokenizer.token_to_id("[PAD]") == 0


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "a"], r"it lacks \[SEP\]: it is a different file"),
        (["a", *SPECIAL], r"the first line of .* must be \[PAD\], but is 'a'"),
        ([*PIECES, "film"], r"contains 'film' twice"),
        ([*PIECES, *map(str, range(10))], r"has 24 pieces and the recipe has room for 20"),
        ([], r"it lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
    ],
)
def test_a_vocabulary_that_does_not_fit(tmp_path: Path, pieces: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        WordPiece.from_file(write(tmp_path, pieces), 8, size=20)


def test_line_ends_and_encodings(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes("\r\n".join(PIECES).encode())
    assert WordPiece.from_file(path, 8, size=20).size == len(PIECES)
    path.write_bytes(b"[PAD]\n\xff")
    with pytest.raises(DataError, match="could not be read as UTF-8"):
        WordPiece.from_file(path, 8, size=20)


@pytest.mark.parametrize("inside", [".", "vocab", "vocab/bert-base-uncased", "bert-base-uncased"])
def test_where_a_vocabulary_is_found(tmp_path: Path, inside: str) -> None:
    assert find_vocabulary(tmp_path) is None
    path = write(tmp_path / inside)
    found = find_vocabulary(tmp_path)
    assert found is not None and found.samefile(path)


def test_without_tokenizers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=re.escape(install_command("text"))):
        WordPiece.from_texts(["a"], 8, size=20)
