"""GLUE with a small BERT trained from scratch: the tasks of the ``glue-`` recipes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dynarank.sinks.extras import install_command
from dynarank.train.glue_files import GLUE, read_glue, read_glue_hub
from dynarank.train.networks import build_network
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.sentence_task import (
    ACCURACY,
    F1,
    MATTHEWS,
    PEARSON,
    SPEARMAN,
    ClassificationTask,
    Examples,
    Measure,
    RegressionTask,
)
from dynarank.train.sentences import SentenceData, Sentences, limit_sentences
from dynarank.train.sources import DataError
from dynarank.train.task import Sketch
from dynarank.train.wordpiece import WordPiece, find_vocabulary

__all__ = ["MEASURES", "GlueOptions", "make_task", "sketch"]

# The main metric first. For MRPC it is accuracy: two thirds of its pairs are paraphrases, so that
# always predicting this class already has an F1 of 0.81.
MEASURES: dict[str, Sequence[Measure]] = {
    "sst2": (ACCURACY,),
    "mrpc": (ACCURACY, F1),
    "cola": (MATTHEWS, ACCURACY),
    "rte": (ACCURACY,),
    "stsb": (SPEARMAN, PEARSON),
}
_HIGHEST = 5.0  # the highest score of STS-B; scores are scaled to 0 to 1 for training


@dataclass(frozen=True)
class GlueOptions:
    """The data options of a GLUE recipe.

    Args:
        length: the number of tokens per sentence or pair.
        vocabulary: the rows of the network's embedding, the largest size of the vocabulary.

    Raises:
        ValueError: if there is no room for a token besides [CLS] and two [SEP].
    """

    length: int = 64
    vocabulary: int = 30_522

    def __post_init__(self) -> None:
        if self.length < 5 or self.vocabulary < 6:
            raise ValueError(
                f"length must be at least 5 and vocabulary at least 6, got {self.length} and "
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
) -> ClassificationTask | RegressionTask:
    """Read and tokenize the sentences; see :func:`dynarank.train.tasks.make_task`.

    The vocabulary is read from ``vocab.txt`` in the data folder or its ``vocab/``. Without one, a
    vocabulary is trained on all training sentences, regardless of ``train_limit``.

    Raises:
        DataError: no location is given, or the data is missing or damaged.
        ImportError: ``tokenizers`` is not installed.
    """
    options = _options(recipe)
    place = os.environ.get("DYNARANK_DATA", "") if data is None else data
    found = _read(recipe.data, place)
    pieces = _pieces(place, found, options)
    parts = [
        limit_sentences(found.train, train_limit, what="training"),
        limit_sentences(found.test, test_limit, what="test"),
    ]
    train, test = (_examples(pieces, part).to(device) for part in parts)
    kind = RegressionTask if GLUE[recipe.data].labels is None else ClassificationTask
    facts = {"vocabulary": pieces.source, "pieces": pieces.size}
    build, measures = partial(_build, recipe), MEASURES[recipe.data]
    return kind(recipe, train, test, build, measures, seed=seed, facts=facts)


def sketch(recipe: Recipe) -> Sketch:
    """The network and one batch of tokens and segments on the meta device."""
    with torch.device("meta"):
        tokens = torch.zeros(recipe.batch_size, _options(recipe).length, dtype=torch.long)
        return Sketch(_build(recipe), (tokens, torch.zeros_like(tokens)))


def _options(recipe: Recipe) -> GlueOptions:
    try:
        return GlueOptions(**recipe.data_options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"recipe {recipe.name!r}, data_options: {error}") from error


def _build(recipe: Recipe) -> nn.Module:
    options, labels = _options(recipe), GLUE[recipe.data].labels
    outputs = 1 if labels is None else len(labels)
    known = {"vocabulary": options.vocabulary, "length": options.length, "outputs": outputs}
    return build_network(recipe, known)


def _read(name: str, place: str) -> SentenceData:
    if not place:
        raise DataError(
            f"no location is given for GLUE's {GLUE[name].folder} (DYNARANK_DATA is not set). As "
            f"--data or DYNARANK_DATA, pass (1) a folder with {GLUE[name].folder}/train.tsv and "
            "dev.tsv, directly or in glue/; or (2) the word hub, to download it (needs "
            f"{install_command('data')})"
        )
    return read_glue_hub(name) if place == "hub" else read_glue(name, Path(place).expanduser())


def _pieces(place: str, found: SentenceData, options: GlueOptions) -> WordPiece:
    path = None if place == "hub" else find_vocabulary(Path(place).expanduser())
    if path is not None:
        return WordPiece.from_file(path, options.length, size=options.vocabulary)
    return WordPiece.from_texts(found.train.texts(), options.length, size=options.vocabulary)


def _examples(pieces: WordPiece, sentences: Sentences) -> Examples:
    labels: Tensor = torch.from_numpy(sentences.labels)
    scaled = (labels / _HIGHEST).float() if labels.is_floating_point() else labels
    return Examples(pieces.encode(sentences), scaled)
