"""Tables: what they become, and what is said of those that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dynarank.train.readers.csv_table import read
from dynarank.train.sources import DataError

ROWS = [f"{i}.5,{'red' if i % 3 else 'blue'},{i % 4},{'yes' if i % 2 else 'no'}" for i in range(40)]
HEAD = "size,color,rooms,sold"


def table(folder: Path, rows: list[str] = ROWS, head: str = HEAD, name: str = "a.csv") -> str:
    (folder / name).write_text("\n".join([head, *rows]) + "\n")
    return name


def test_columns_become_features_and_words_classes(tmp_path: Path) -> None:
    (x, y), (x_test, y_test) = read(table(tmp_path), tmp_path)
    assert (x.shape, x_test.shape, x.dtype, y.dtype) == ((32, 4), (8, 4), torch.float32, torch.long)
    assert torch.allclose(x[:, [0, 3]].mean(0), torch.zeros(2), atol=1e-6)
    assert torch.equal(x[:, 1] + x[:, 2], torch.ones(32))  # one-hot: blue, red
    assert y.bincount().tolist() == [16, 16] and y_test.bincount().tolist() == [4, 4]
    again = read(table(tmp_path), tmp_path)
    assert torch.equal(again[0][0], x)


def test_targets(tmp_path: Path) -> None:
    name = table(tmp_path)
    assert read(name, tmp_path, target="size")[0][1].is_floating_point()
    assert read(name, tmp_path, target="rooms")[0][1].unique().tolist() == [0, 1, 2, 3]
    assert read(name, tmp_path, target="rooms", task="regression")[0][1].dtype == torch.float32
    assert read(name, tmp_path, categorical=["rooms"])[0][0].shape[1] == 7
    assert read(name, tmp_path, drop=["color"])[0][0].shape[1] == 2
    other = table(tmp_path, ROWS[:6], name="b.csv")
    (x, _), (x_test, _) = read(name, tmp_path, test=other)
    assert (len(x), len(x_test)) == (40, 6)


CASES: dict[str, tuple[list[str], str, dict[str, Any], str]] = {
    "empty": ([], HEAD, {}, "no rows below its header"),
    "ragged": ([*ROWS, "1.5,red,3"], HEAD, {}, "row 42 has 3 cells, the header 4"),
    "missing": ([*ROWS, ",red,3,no"], HEAD, {}, "row 42, column 'size' is empty"),
    "nan": ([*ROWS, "nan,red,3,no"], HEAD, {}, "row 42, column 'size' is 'nan', among numbers"),
    "typo": ([*ROWS, "1o,red,3,no"], HEAD, {}, "row 42, column 'size' is '1o', among numbers"),
    "no header": (ROWS, ROWS[0], {}, "has no header: its first row is 0.5"),
    "twice": (ROWS, "a,a,b,c", {}, "every column needs a name of its own"),
    "no column": (ROWS, HEAD, {"target": "price"}, "no column 'price'; it has size, color"),
    "one class": ([r[:-3] + "yes" for r in ROWS[1::2]], HEAD, {}, "has one class, 'yes'"),
    "key": ([f"k{i},{i % 2}" for i in range(1100)], "id,y", {}, "1100 different words"),
    "counts": (
        [f"1.5,{i}" for i in range(200)],
        "x,n",
        {},
        "200 different whole numbers",
    ),
    "task": (ROWS, HEAD, {"task": "ranking"}, "task is classification or regression"),
    "words": (ROWS, HEAD, {"task": "regression"}, "has words: it is no target of a regression"),
    "alone": ([r.split(",")[3] for r in ROWS], "sold", {}, "no column but the target"),
    "share": (ROWS, HEAD, {"test_share": 1.5}, "test_share must be between 0 and 1, got 1.5"),
    "few": (ROWS[:2], HEAD, {}, "2 examples cannot be split"),
    "quote": (['"open'], HEAD, {}, "is not a table"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_has_a_place(name: str, tmp_path: Path) -> None:
    rows, head, options, told = CASES[name]
    with pytest.raises(DataError, match=told):
        read(table(tmp_path, rows, head), tmp_path, **options)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.csv does not exist"):
        read("absent.csv", tmp_path)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="could not be read as UTF-8"):
        read("b.csv", tmp_path)


@pytest.mark.parametrize(
    ("cell", "told"),
    [("NA", "row 2, column 'age' is 'NA', a missing number"), ("1,5", "write decimal points")],
)
def test_words_that_mean_numbers_are_no_categories(cell: str, told: str, tmp_path: Path) -> None:
    ages = [f'"{cell}"' if i % 4 == 0 or "," in cell else str(i) for i in range(40)]
    name = table(tmp_path, [f"{age},{i % 2}" for i, age in enumerate(ages)], "age,sold")
    with pytest.raises(DataError, match=told):
        read(name, tmp_path)
    assert read(name, tmp_path, categorical=["age"])[0][0].shape[1] > 0
