"""Readers for five GLUE tasks: the official .tsv files, or the Hugging Face hub.

GLUE's test labels are not public: as usual, the ``dev`` split is used for testing.

=======  =======  =======================================  ======================
task     folder   one line                                 metrics
=======  =======  =======================================  ======================
sst2     SST-2    sentence, label                          accuracy
mrpc     MRPC     label, id, id, sentence, sentence        F1, accuracy
cola     CoLA     source, label, mark, sentence            Matthews correlation
rte      RTE      index, sentence, sentence, label         accuracy
stsb     STS-B    7 fields, sentence, sentence, score      Spearman, Pearson
=======  =======  =======================================  ======================

Reference: Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding, arXiv 1804.07461, 2018.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynarank.files.printable import printable
from dynarank.train.sentences import SentenceData, Sentences
from dynarank.train.sources import DataError, hub_splits, read_utf8

__all__ = ["GLUE", "GlueTask", "read_glue", "read_glue_hub"]

HUB_NAME = "nyu-mll/glue"
_LABEL_TITLES = ("label", "quality", "score")


@dataclass(frozen=True)
class GlueTask:
    """The columns of a task's files, counted from 0.

    Args:
        folder: the name of its folder.
        fields: the number of tab-separated fields per line.
        first: the field of the sentence, or of the first of two.
        second: the field of the second sentence, or None.
        label: the field of the label.
        labels: the spelling of each class; None if the label is a score from 0 to 5.
    """

    folder: str
    fields: int
    first: int
    label: int
    second: int | None = None
    labels: tuple[str, ...] | None = ("0", "1")


GLUE: dict[str, GlueTask] = {
    "sst2": GlueTask("SST-2", fields=2, first=0, label=1),
    "mrpc": GlueTask("MRPC", fields=5, first=3, second=4, label=0),
    "cola": GlueTask("CoLA", fields=4, first=3, label=1),
    "rte": GlueTask(
        "RTE", fields=4, first=1, second=2, label=3, labels=("entailment", "not_entailment")
    ),
    "stsb": GlueTask("STS-B", fields=10, first=7, second=8, label=9, labels=None),
}


def read_glue(name: str, place: Path) -> SentenceData:
    """Read a task's ``train.tsv`` and ``dev.tsv``.

    Args:
        name: the name of the task in :data:`GLUE`.
        place: the task's folder, or one that contains it, directly or in ``glue/``.

    Raises:
        DataError: if the files are missing, or a line is malformed.
    """
    task = GLUE[name]
    folders = [
        place,
        place / task.folder,
        place / "glue" / task.folder,
        place / "GLUE" / task.folder,
    ]
    found = next((f for f in folders if f.name == task.folder and _there(f)), None)
    if found is None:
        raise DataError(
            f"GLUE's {task.folder} is not in {place}: there are no train.tsv and dev.tsv in "
            f"{', '.join(str(f) for f in folders if f.name == task.folder)}; unpack the task's "
            "folder there"
        )
    return SentenceData(*(_read(task, found / f"{split}.tsv") for split in ("train", "dev")))


def read_glue_hub(name: str) -> SentenceData:
    """Read a task through ``datasets``, from the hub or its cache.

    Raises:
        ImportError: if the ``data`` extra is not installed.
        DataError: if the data set cannot be loaded.
    """
    what = f"GLUE's {GLUE[name].folder}"
    with hub_splits(what, "the .tsv files", HUB_NAME, name) as splits:
        return SentenceData(*(_from_hub(GLUE[name], splits[s]) for s in ("train", "validation")))


def _there(folder: Path) -> bool:
    return (folder / "train.tsv").is_file() and (folder / "dev.tsv").is_file()


def _from_hub(task: GlueTask, split: Any) -> Sentences:
    first, second = ("sentence", None) if task.second is None else ("sentence1", "sentence2")
    labels: Any = np.asarray(split["label"], np.float64 if task.labels is None else np.int64)
    return Sentences(list(split[first]), list(split[second]) if second else None, labels)


def _read(task: GlueTask, path: Path) -> Sentences:
    """Read one file, with or without a title.

    Quotation marks are part of the text; only line feeds end a line.
    """
    lines = read_utf8(path, "utf-8-sig").split("\n")  # MRPC's begin with a byte order mark
    rows = [
        _fields(task, path, number, line.removesuffix("\r"))
        for number, line in enumerate(lines, start=1)
        if not (number == 1 and _is_title(task, line)) and not (number == len(lines) and not line)
    ]
    if not rows:
        raise DataError(f"{path} contains no examples: it is a different file; fetch it again")
    second = None if task.second is None else [row[task.second] for row in rows]
    return Sentences([row[task.first] for row in rows], second, _labels(task, rows))


def _is_title(task: GlueTask, line: str) -> bool:
    """Whether a first line names the columns, as all do but CoLA's, instead of an example."""
    fields = line.removesuffix("\r").split("\t")
    return len(fields) == task.fields and fields[task.label].strip().casefold() in _LABEL_TITLES


def _fields(task: GlueTask, path: Path, number: int, line: str) -> list[str]:
    fields = line.split("\t")
    if len(fields) != task.fields:
        raise DataError(
            f"{path}, line {number}: a line of {task.folder} must have {task.fields} fields "
            f"separated by tabs, but has {len(fields)}: {line[:80]!r}"
        )
    if problem := _wrong_label(task, fields[task.label]):
        raise DataError(f"{path}, line {number}: {problem}: the file is damaged or a different one")
    return fields


def _wrong_label(task: GlueTask, label: str) -> str | None:
    shown = printable(repr(label))
    if task.labels is not None:
        wanted = " or ".join(map(repr, task.labels))
        return (
            None
            if label in task.labels
            else f"the label must be {wanted}, but is {printable(label)!r}"
        )
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    return None if 0 <= score <= 5 else f"the score must be from 0 to 5, but is {shown}"


def _labels(task: GlueTask, rows: Sequence[Sequence[str]]) -> Any:
    found = [row[task.label] for row in rows]
    if task.labels is None:
        return np.array([float(label) for label in found], np.float64)
    return np.array([task.labels.index(label) for label in found], np.int64)
