"""Data sets through ``datasets``, with a stand-in for the library."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dynarank.train.readers.hub import read
from dynarank.train.recipes import load_recipe
from dynarank.train.sources import DataError
from dynarank.train.tasks import make_task


class Split:
    """As much of a ``datasets.Dataset`` as is used."""

    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None = None) -> None:
        self.columns, self.column_names = columns, list(columns)
        self.features = {name: SimpleNamespace(names=names) for name in columns}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}

    def select(self, indices: list[int]) -> Split:
        picked = {name: [v[i] for i in indices] for name, v in self.columns.items()}
        return Split(picked, self.features["label"].names)


def rows(count: int) -> dict[str, list[Any]]:
    return {
        "features": [[float(i), 1.0, -float(i)] for i in range(count)],
        "text": ["words"] * count,
        "label": [i % 2 for i in range(count)],
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    known: dict[str, Any] = {}

    def load_dataset(*name: str) -> Any:
        if name[0] not in known:
            raise FileNotFoundError(f"no data set {name}")
        return known[name[0]]

    module: Any = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return known


def test_columns_and_splits(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["a/b"] = {"train": Split(rows(20), ["no", "yes"]), "test": Split(rows(4))}
    train, test = read("a/b", tmp_path)
    x, y = train[3]
    assert (x.tolist(), y.item(), len(test), train.classes) == ([3, 1, -3], 1, 4, ["no", "yes"])
    assert x.dtype == torch.float32
    hub["a/c"] = {"train": Split(rows(20), ["no", "yes"])}
    assert [len(part) for part in read("a/c", tmp_path)] == [16, 4]
    both = read("a/b", tmp_path, inputs=["features", "label"], target="label")[0][1]
    assert both.keys() == {"features", "label", "labels"}


def test_a_recipe_of_the_hub(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["a/b"] = {"train": Split(rows(20), ["no", "yes"]), "test": Split(rows(4))}
    path = tmp_path / "my.toml"
    path.write_text('data = "hf:a/b"\nmodel = "mlp"\nepochs = 1\nlearning_rate = 0.1\n'
                    "batch_size = 5\n")  # fmt: skip
    task = make_task(load_recipe(str(path)), seed=0, device=torch.device("cpu"))
    model: Any = task.model()
    assert (task.steps_per_epoch, model.hidden[0].in_features, model.head.out_features) == (4, 3, 2)


def test_what_is_wrong(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["a/b"] = {"train": Split(rows(20)), "other": Split(rows(4))}
    for options, told in [
        ({"inputs": "feature"}, "has the columns features, text, label: set inputs and target"),
        ({"test": "dev"}, "has no split 'dev'; it has train, other"),
        ({"target": "y"}, "set inputs and target in data_options"),
    ]:
        with pytest.raises(DataError, match=told):
            read("a/b", tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="hf:absent could not be loaded"):
        read("absent", tmp_path)
    with pytest.raises(DataError, match="row 0, column 'text' is str, no number; text is token"):
        read("a/b", tmp_path, inputs="text")[0][0]
