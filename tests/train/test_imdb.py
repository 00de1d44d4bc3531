"""``imdb-lstm``, from files to figures."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dynarank.train.imdb import make_task, sketch
from dynarank.train.recipes import Recipe, RecipeError, load_recipe
from dynarank.train.sentence_task import ClassificationTask
from dynarank.train.sources import DataError

CPU = torch.device("cpu")


def recipe(**changes: object) -> Recipe:
    small = {
        "batch_size": 8,
        "data_options": {"length": 6, "vocabulary": 20},
        "model_options": {"width": 8, "hidden": 8, "dropout": 0.0},
    }
    return Recipe.model_validate({**load_recipe("imdb-lstm").model_dump(), **small, **changes})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for split, count in (("train", 24), ("test", 10)):
        for name, rating, word in (("neg", 2, "bad"), ("pos", 8, "good")):
            folder = tmp_path / "aclImdb" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                text = f"word{number % 7} a {word} film<br />number {number}"
                (folder / f"{number}_{rating}.txt").write_text(text)
    return tmp_path


def make(place: Path, **limits: int) -> ClassificationTask:
    options = {"train_limit": None, "test_limit": None, **limits}
    return make_task(recipe(), str(place), seed=0, device=CPU, **options)


def test_it_learns(place: Path) -> None:
    task = make(place)
    assert (task.train_size, len(task.test.labels), task.metric.name) == (48, 20, "accuracy")
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for epoch in range(4):
        for batch in task.epoch(epoch):
            loss, _ = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        assert task.evaluate(model.eval(), nullcontext).scores["accuracy"] == 1


def test_a_sketch_is_the_task_without_data(place: Path) -> None:
    drawn, task = sketch(recipe()), make(place)
    (sample,) = task.sample()
    assert drawn.sample.shape == sample.shape and drawn.sample.is_meta
    shapes = {key: p.shape for key, p in task.model().named_parameters()}
    assert shapes == {key: p.shape for key, p in drawn.model.named_parameters()}


def test_limits_keep_classes_balanced_and_the_vocabulary(place: Path) -> None:
    whole, part = make(place), make(place, train_limit=8, test_limit=4)
    assert part.train.labels.bincount().tolist() == [4, 4]
    assert part.test.labels.bincount().tolist() == [2, 2]
    rows = {tuple(row) for row in whole.train.inputs[0].tolist()}
    assert {tuple(row) for row in part.train.inputs[0].tolist()} <= rows


def test_where_the_data_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"train_limit": None, "test_limit": None}
    monkeypatch.setenv("DYNARANK_DATA", str(place))
    assert make_task(recipe(), None, seed=0, device=CPU, **limits).train_size == 48
    monkeypatch.delenv("DYNARANK_DATA")
    with pytest.raises(DataError, match=r"no location .* IMDb reviews .* \(1\) the folder aclImdb"):
        make_task(recipe(), None, seed=0, device=CPU, **limits)


@pytest.mark.parametrize("options", [{"length": 0}, {"vocabulary": 2}, {"lenght": 9}])
def test_options_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="recipe 'imdb-lstm', data_options: "):
        sketch(recipe(data_options=options))
