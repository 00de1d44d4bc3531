"""Small made-up GLUE tasks in the official formats, and a tiny sentence encoder beside them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tiny_encoder import WORDS, write_tiny_encoder

from benchmarks.training.problems.encoder import NAME

SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma")
MANY = [first + last for first in SYLLABLES for last in "bdknrst"]


def write_sst2(folder: Path) -> None:
    """Sentences of 18 words, each with two phrases of it."""
    source = random.Random(0)
    for name, count in (("train", 40), ("dev", 20)):
        wholes = [source.choices(MANY, k=18) for _ in range(count)]
        parts = [(i, part) for i, w in enumerate(wholes) for part in (w, w[:7], w[9:12])]
        rows = [f"{' '.join(part)} \t{i % 2}" for i, part in parts]
        write(folder / "SST-2" / f"{name}.tsv", "sentence label", rows)


def write_mrpc(folder: Path) -> None:
    """Pairs, every second of them of the same meaning."""
    for name, count in (("train", 100), ("dev", 30)):
        rows = [f"{i % 2}\t{i}\t{i}\t{a}\t{b}" for i, a, b in pairs(MANY, count, name)]
        write(folder / "MRPC" / f"{name}.tsv", "Quality id1 id2 String1 String2", rows)


def write_stsb(folder: Path) -> None:
    """Pairs of words that the tiny encoder knows, with scores from 0 to 5."""
    fields = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
    none = 6 * "\tnone"
    for name, count in (("train", 60), ("dev", 20)):
        rows = [f"{i}{none}\t{a}\t{b}\t{i % 6}" for i, a, b in pairs(WORDS, count, name)]
        write(folder / "STS-B" / f"{name}.tsv", fields, rows)


def write_rte(folder: Path) -> None:
    """Pairs of words that the tiny encoder knows."""
    labels = ("entailment", "not_entailment")
    for name, count in (("train", 60), ("dev", 20)):
        rows = [f"{i}\t{a}\t{b}\t{labels[i % 2]}" for i, a, b in pairs(WORDS, count, name)]
        write(folder / "RTE" / f"{name}.tsv", "index sentence1 sentence2 label", rows)


def write_encoder(folder: Path) -> None:
    """The encoder, where the problems look for it."""
    write_tiny_encoder(folder)
    (folder / "encoder").rename(folder / NAME)


def pairs(words: list[str], count: int, seed: str) -> Iterator[tuple[int, str, str]]:
    """A number and two sentences."""
    source = random.Random(seed)
    for i in range(count):
        yield i, *(" ".join(source.choices(words, k=7)) for _ in range(2))


def write(path: Path, title: str, rows: list[str]) -> None:
    """A file of the title, whose words name the fields, and the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [title.replace(" ", "\t"), *rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
