"""Readers for IMDb reviews: the official folders, or the Hugging Face hub.

25,000 + 25,000 labeled reviews, half of them positive.

Reference: Maas et al., Learning Word Vectors for Sentiment Analysis, ACL 2011.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from dynarank.files.printable import printable
from dynarank.train.sentences import SentenceData, Sentences
from dynarank.train.sources import DataError, hub_splits, read_utf8

__all__ = ["read_imdb", "read_imdb_hub"]

HUB_NAME = "stanfordnlp/imdb"
FOLDER = "aclImdb"
_CLASSES = (("neg", range(1, 5)), ("pos", range(7, 11)))  # with the ratings of each class
_NAME = re.compile(r"(\d+)_(\d+)\.txt")


def read_imdb(place: Path) -> SentenceData:
    """Read ``{train,test}/{pos,neg}/ID_RATING.txt``.

    Args:
        place: the folder ``aclImdb`` with ``train`` and ``test``, or the folder that contains it.

    Raises:
        DataError: if a folder is missing or empty, or a file has an unexpected name.
    """
    places = [place, place / FOLDER]
    found = next((p for p in places if (p / "train" / "pos").is_dir()), None)
    if found is None:
        raise DataError(
            f"the IMDb reviews are not in {place}: there is no train/pos in "
            f"{' or '.join(map(str, places))}; unpack aclImdb_v1.tar.gz there"
        )
    return SentenceData(*(_read(found / split) for split in ("train", "test")))


def read_imdb_hub() -> SentenceData:
    """Read the reviews through ``datasets``, from the hub or its cache.

    Raises:
        ImportError: if the ``data`` extra is not installed.
        DataError: if the data set cannot be loaded.
    """
    with hub_splits("the set of IMDb reviews", "aclImdb", HUB_NAME) as splits:
        parts = (splits["train"], splits["test"])
        return SentenceData(
            *(Sentences(list(p["text"]), None, np.asarray(p["label"], np.int64)) for p in parts)
        )


def _read(folder: Path) -> Sentences:
    """Read one split, negative reviews first, each class in numerical order."""
    texts: list[str] = []
    labels: list[int] = []
    for label, (name, ratings) in enumerate(_CLASSES):
        files = _numbered(folder / name, ratings)
        texts += [read_utf8(path) for path in files]
        labels += [label] * len(files)
    return Sentences(texts, None, np.array(labels, np.int64))


def _numbered(folder: Path, ratings: range) -> list[Path]:
    found: dict[int, Path] = {}
    for path in folder.glob("*.txt"):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[2]) not in ratings:
            raise DataError(
                f"{printable(str(path))}: reviews in {folder.name}/ must be named "
                f"NUMBER_RATING.txt with a rating from {ratings[0]} to {ratings[-1]}; the "
                "folder is damaged or a different one: unpack it again"
            )
        if (other := found.setdefault(int(match[1]), path)) is not path:
            raise DataError(
                f"{path} and {other.name} have the same number; the folder is damaged or a "
                "different one: unpack it again"
            )
    if not found:
        raise DataError(f"{folder} must contain reviews named NUMBER_RATING.txt, but has none")
    return [found[number] for number in sorted(found)]
