"""GLUE's files: each layout with its quirks, and what is said of files that are damaged."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynarank.sinks.extras import install_command
from dynarank.train.glue_files import GLUE, read_glue, read_glue_hub
from dynarank.train.sources import DataError

# As the published files begin, with their marks; sentences are made up.
FILES = {
    "sst2": ("sentence\tlabel\n", "a joy \t1\n", 'dull , " flat \t0\n'),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        '1\t12\t13\tHe said "yes.\tHe agreed.\n',
        "0\t14\t15\tIt rained.\tIt's dry.\n",
    ),
    "cola": ("", "gj04\t1\t\tThey sailed.\n", "gj04\t0\t*\tSailed they have the.\n"),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n",
        "0\tRain fell.\tIt was wet.\tentailment\n",
        "1\tRain fell.\tIt was dry.\tnot_entailment\n",
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n",
        "0\tnews\tf\t2012\t1\tnone\tnone\tA man.\tA person.\t3.800\n",
        "1\tnews\tf\t2012\t2\tnone\tnone\tA cat.\tA plane.\t0.000\n",
    ),
}
FIRST = {
    "sst2": ["a joy ", 'dull , " flat '],
    "mrpc": ['He said "yes.', "It rained."],
    "cola": ["They sailed.", "Sailed they have the."],
    "rte": ["Rain fell.", "Rain fell."],
    "stsb": ["A man.", "A cat."],
}
LABELS = {"sst2": [1, 0], "mrpc": [1, 0], "cola": [1, 0], "rte": [0, 1], "stsb": [3.8, 0.0]}


def write(folder: Path, train: str, dev: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.tsv").write_bytes(train.encode())
    (folder / "dev.tsv").write_bytes((train if dev is None else dev).encode())
    return folder


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize("inside", [".", "glue", "GLUE"])
def test_every_layout(tmp_path: Path, name: str, inside: str) -> None:
    write(tmp_path / inside / GLUE[name].folder, "".join(FILES[name]))
    data = read_glue(name, tmp_path)
    assert list(data.train.first) == list(data.test.first) == FIRST[name]
    assert data.train.labels.tolist() == LABELS[name]
    assert data.train.labels.dtype.kind == ("f" if name == "stsb" else "i")
    paired = name in ("mrpc", "rte", "stsb")
    assert (data.train.second is not None) == paired
    if paired:
        assert data.train.second is not None and len(data.train.texts()) == 4
    assert read_glue(name, tmp_path / inside / GLUE[name].folder).train.first == FIRST[name]


@pytest.mark.parametrize("ending", ["\n", ""])
@pytest.mark.parametrize("carriage", ["", "\r"])
def test_line_ends(tmp_path: Path, ending: str, carriage: str) -> None:
    lines = [line.strip("\n") + carriage for line in FILES["sst2"]]
    write(tmp_path / "SST-2", "\n".join(lines) + ending)
    assert read_glue("sst2", tmp_path).train.labels.tolist() == [1, 0]


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    sentence = "one\x85two\u2028three\x0bfour"
    write(tmp_path / "SST-2", f"sentence\tlabel\n{sentence}\t1\n")
    assert read_glue("sst2", tmp_path).train.first == [sentence]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("sst2", "no label\n", r"train\.tsv, line 4: a line of SST-2 must have 2 fields .* has 1"),
        ("sst2", "a\tb\t1\n", r"line 4: .* must have 2 fields separated by tabs, but has 3"),
        ("sst2", "a\t2\n", r"line 4: the label must be '0' or '1', but is '2'"),
        ("rte", "2\ta\tb\tmaybe\n", r"line 4: the label must be 'entailment' or 'not_entail"),
        ("cola", "\n", r"line 3: a line of CoLA must have 4 fields separated by tabs, but has 1"),
        (
            "stsb",
            "2\tg\tf\ty\t1\tn\tn\ta\tb\t5.5\n",
            r"the score must be from 0 to 5, but is '5\.5",
        ),
        ("stsb", "2\tg\tf\ty\t1\tn\tn\ta\tb\tnan\n", r"must be from 0 to 5, but is 'nan'"),
        ("stsb", "2\tg\tf\ty\t1\tn\tn\ta\tb\tx\n", r"must be from 0 to 5, but is 'x'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, line: str, message: str) -> None:
    text = "".join(FILES[name])
    write(tmp_path / GLUE[name].folder, text + line + FILES[name][1], text)
    with pytest.raises(DataError, match=message):
        read_glue(name, tmp_path)


def test_missing_files_say_what_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "MRPC", "".join(FILES["mrpc"]))
    with pytest.raises(DataError, match=r"there are no train\.tsv and dev\.tsv in .*glue/SST-2"):
        read_glue("sst2", tmp_path)
    (tmp_path / "MRPC" / "dev.tsv").unlink()
    with pytest.raises(DataError, match=r"GLUE's MRPC is not in"):
        read_glue("mrpc", tmp_path)


@pytest.mark.parametrize("content", [b"sentence\tlabel\n", b"", b"sentence\tlabel\n\xff\t1\n"])
def test_a_file_that_is_no_data_is_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "SST-2", "".join(FILES["sst2"]))
    (tmp_path / "SST-2" / "dev.tsv").write_bytes(content)
    with pytest.raises(DataError, match=r"dev\.tsv"):
        read_glue("sst2", tmp_path)


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    split = {"sentence1": ["a"], "sentence2": ["b"], "label": [4.5]}
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str) -> dict[str, dict[str, list[object]]]:
        asked.append(names)
        return {"train": split, "validation": split, "test": {}}

    hub = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = read_glue_hub("stsb")
    assert asked == [("nyu-mll/glue", "stsb")]
    assert (data.test.first, data.test.second, data.test.labels.tolist()) == (["a"], ["b"], [4.5])
    with pytest.raises(DataError, match=r"from the hub .*'sst2'.* failed: KeyError\('sentence'\)"):
        read_glue_hub("sst2")


def test_the_hub_needs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=re.escape(install_command("data"))):
        read_glue_hub("sst2")


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("DYNARANK_DATA"), reason="DYNARANK_DATA is not set")
@pytest.mark.parametrize(
    ("name", "train", "dev", "positive"),
    [  # examples, and the share of class 1 (the mean score) of the test part, as published
        ("sst2", 67_349, 872, 0.509),
        ("mrpc", 3_668, 408, 0.684),
        ("cola", 8_551, 1_043, 0.691),
        ("rte", 2_490, 277, 0.473),
        ("stsb", 5_749, 1_500, 2.364),
    ],
)
def test_real_glue(name: str, train: int, dev: int, positive: float) -> None:
    data = read_glue(name, Path(os.environ["DYNARANK_DATA"]))
    assert (len(data.train), len(data.test)) == (train, dev)
    assert data.test.labels.mean() == pytest.approx(positive, abs=5e-4)
    assert all(text.strip() for text in data.test.texts())
