"""IMDb reviews with a recurrent network, the task of ``imdb-lstm``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dynarank.sinks.extras import install_command
from dynarank.train.imdb_files import read_imdb, read_imdb_hub
from dynarank.train.networks import build_network
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.sentence_task import ACCURACY, ClassificationTask, Examples
from dynarank.train.sentences import SentenceData, Sentences, limit_sentences
from dynarank.train.sources import DataError
from dynarank.train.task import Sketch
from dynarank.train.words import Words

__all__ = ["ImdbOptions", "make_task", "sketch"]

_CLASSES = 2


@dataclass(frozen=True)
class ImdbOptions:
    """The data options of an IMDb recipe.

    Args:
        length: the number of words per review; of longer reviews the end is kept.
        vocabulary: the size of the vocabulary, including padding and unknown words.

    Raises:
        ValueError: if there is no room for a word.
    """

    length: int = 256
    vocabulary: int = 20_000

    def __post_init__(self) -> None:
        if self.length < 1 or self.vocabulary < 3:
            raise ValueError(
                f"length must be at least 1 and vocabulary at least 3, got {self.length} and "
                f"{self.vocabulary}"
            )


def make_task(
    recipe: Recipe,
    data: str | None,
    *,
    seed: int,
    device: torch.device,
    train_limit: int | None,
    test_limit: int | None,
) -> ClassificationTask:
    """Read and encode the reviews; see :func:`dynarank.train.tasks.make_task`.

    The vocabulary is that of all training reviews, regardless of ``train_limit``.

    Raises:
        DataError: no location is given, or the data is missing or damaged.
    """
    options = _options(recipe)
    found = _read(os.environ.get("DYNARANK_DATA", "") if data is None else data)
    parts = [
        limit_sentences(found.train, train_limit, what="training"),
        limit_sentences(found.test, test_limit, what="test"),
    ]
    words = Words(found.train.first, options.vocabulary)
    train, test = (_examples(words, part, options.length).to(device) for part in parts)
    build = partial(_build, recipe)
    return ClassificationTask(recipe, train, test, build, [ACCURACY], seed=seed)


def sketch(recipe: Recipe) -> Sketch:
    """The network and one batch of words on the meta device."""
    with torch.device("meta"):
        shape = (recipe.batch_size, _options(recipe).length)
        return Sketch(_build(recipe), torch.zeros(shape, dtype=torch.long))


def _options(recipe: Recipe) -> ImdbOptions:
    try:
        return ImdbOptions(**recipe.data_options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"recipe {recipe.name!r}, data_options: {error}") from error


def _build(recipe: Recipe) -> nn.Module:
    known = {"vocabulary": _options(recipe).vocabulary, "outputs": _CLASSES}
    return build_network(recipe, known)


def _read(place: str) -> SentenceData:
    if not place:
        raise DataError(
            "no location is given for the IMDb reviews (DYNARANK_DATA is not set). As --data or "
            "DYNARANK_DATA, pass (1) the folder aclImdb, aclImdb_v1.tar.gz unpacked, or the folder "
            "that contains it; or (2) the word hub, to download them (needs "
            f"{install_command('data')})"
        )
    return read_imdb_hub() if place == "hub" else read_imdb(Path(place).expanduser())


def _examples(words: Words, sentences: Sentences, length: int) -> Examples:
    labels = torch.from_numpy(sentences.labels)
    return Examples((words.encode(sentences.first, length),), labels)
