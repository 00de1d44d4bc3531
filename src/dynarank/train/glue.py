"""GLUE with a small BERT trained from scratch: the tasks of the ``glue-`` recipes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dynarank.train.glue_files import GLUE, read_glue, read_glue_hub
from dynarank.train.recipes import Recipe, RecipeError
from dynarank.train.registry import build_model
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

# The main one first. MRPC's is accuracy: two thirds of its pairs are paraphrases, and calling all
# of them so has an F1 of .81 already.
MEASURES: dict[str, Sequence[Measure]] = {
    "sst2": (ACCURACY,),
    "mrpc": (ACCURACY, F1),
    "cola": (MATTHEWS, ACCURACY),
    "rte": (ACCURACY,),
    "stsb": (SPEARMAN, PEARSON),
}
_HIGHEST = 5.0  # of STS-B's scores, which are trained on as 0 to 1


@dataclass(frozen=True)
class GlueOptions:
    """What a recipe may say of its sentences.

    Args:
        length: tokens a sentence or pair.
        vocabulary: rows of the network's embedding: the most pieces a vocabulary may have.

    Raises:
        ValueError: if there is no room for a token beside [CLS] and two [SEP].
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

    Pieces come from the ``vocab.txt`` in the data folder (itself, or in ``vocab/``); without one, a
    vocabulary is trained on the training sentences, all of them whatever the limit.

    Raises:
        DataError: no place is named, or what is there is absent or damaged.
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
    """The network and one batch of tokens and segments, without memory and without data."""
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
    return build_model(
        recipe.model,
        vocabulary=options.vocabulary,
        length=options.length,
        outputs=1 if labels is None else len(labels),
        **recipe.model_options,
    )


def _read(name: str, place: str) -> SentenceData:
    if not place:
        raise DataError(
            f"GLUE's {GLUE[name].folder} was asked for and no place to read it from was named "
            "(DYNARANK_DATA is not set). Name (1) a folder that holds "
            f"{GLUE[name].folder}/train.tsv and dev.tsv, itself or in glue/; or (2) the word hub, "
            "to download it (needs pip install 'dynarank[data]'): as --data or DYNARANK_DATA"
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
