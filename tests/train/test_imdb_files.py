"""IMDb's folders: what is read, in which order, and what is refused."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynarank.sinks.extras import install_command
from dynarank.train.imdb_files import read_imdb, read_imdb_hub
from dynarank.train.sources import DataError

FILES = {
    "train/neg/10_2.txt": "awful",
    "train/neg/9_1.txt": "bad",
    "train/pos/0_9.txt": "fine",
    "test/neg/0_4.txt": "dull",
    "test/pos/0_7.txt": "caf\u00e9",
    "train/unsup/0_0.txt": "no label",
    "train/labeledBow.feat": "not a review",
}


def write(folder: Path, files: dict[str, str] = FILES) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("inside", [".", "aclImdb"])
def test_reviews_by_number(tmp_path: Path, inside: str) -> None:
    write(tmp_path / inside)
    data = read_imdb(tmp_path)
    assert data.train.first == ["bad", "awful", "fine"]  # 9 before 10: not by the alphabet
    assert data.train.labels.tolist() == [0, 0, 1] and data.train.second is None
    assert data.test.first == ["dull", "caf\u00e9"] and data.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["train/pos/1_3.txt", "test/neg/1_7.txt", "train/pos/notes.txt"])
def test_a_name_that_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    write(write(tmp_path), {name: "x"})
    with pytest.raises(DataError, match=r"must be named NUMBER_RATING\.txt with a rating from"):
        read_imdb(tmp_path)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no train/pos in .*aclImdb; unpack"):
        read_imdb(tmp_path)
    (write(tmp_path) / "test/neg/0_4.txt").unlink()
    with pytest.raises(DataError, match=r"test/neg must contain reviews .* but has none"):
        read_imdb(tmp_path)


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (write(tmp_path) / "test/pos/0_7.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"0_7\.txt could not be read as UTF-8"):
        read_imdb(tmp_path)


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    split = {"text": ["a", "b"], "label": [0, 1]}
    hub = SimpleNamespace(load_dataset=lambda name: {"train": split, "test": split})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_imdb_hub().test.labels.tolist() == [0, 1]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name: {}))
    with pytest.raises(DataError, match="from the hub as 'stanfordnlp/imdb' failed"):
        read_imdb_hub()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=re.escape(install_command("data"))):
        read_imdb_hub()


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("DYNARANK_DATA"), reason="DYNARANK_DATA is not set")
def test_real_reviews() -> None:
    data = read_imdb(Path(os.environ["DYNARANK_DATA"]))
    for part in (data.train, data.test):
        assert len(part) == 25_000 and part.labels.sum() == 12_500
        assert all(part.first)
