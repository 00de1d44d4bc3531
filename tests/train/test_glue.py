"""The ``glue-`` recipes, from files to figures."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dynarank.train.glue import MEASURES, make_task, sketch
from dynarank.train.glue_files import GLUE
from dynarank.train.recipes import Recipe, RecipeError, load_recipe
from dynarank.train.sentence_task import ClassificationTask, RegressionTask
from dynarank.train.sources import DataError
from dynarank.train.wordpiece import SPECIAL

CPU = torch.device("cpu")
WORDS = ["rain", "sun", "cloud", "wind", "snow", "fog"]


def recipe(name: str, **changes: object) -> Recipe:
    small = {
        "batch_size": 8,
        "data_options": {"length": 16, "vocabulary": 100},
        "model_options": {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0},
    }
    return Recipe.model_validate({**load_recipe(f"glue-{name}").model_dump(), **small, **changes})


def line(name: str, number: int) -> str:
    """One example: the second word decides."""
    first, second = f"the {WORDS[number % 6]} fell", f"a {WORDS[number % 5]}"
    task = GLUE[name]
    fields = ["x"] * task.fields
    fields[task.first] = first
    if task.second is not None:
        fields[task.second] = second
    fields[task.label] = task.labels[number % 2] if task.labels else str(number % 6)
    return "\t".join(fields)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name, task in GLUE.items():
        folder = tmp_path / "glue" / task.folder
        folder.mkdir(parents=True)
        for split, count in (("train", 48), ("dev", 20)):
            lines = [line(name, number) for number in range(count)]
            title = ["title"] * task.fields
            title[task.label] = "label"
            text = "\n".join([*(["\t".join(title)] if name != "cola" else []), *lines])
            (folder / f"{split}.tsv").write_text(text + "\n", encoding="utf-8")
    return tmp_path


def make(name: str, place: Path, **limits: int) -> ClassificationTask | RegressionTask:
    options = {"train_limit": None, "test_limit": None, **limits}
    return make_task(recipe(name), str(place), seed=0, device=CPU, **options)


@pytest.mark.parametrize("name", GLUE)
def test_every_task_from_files_to_figures(name: str, place: Path) -> None:
    task = make(name, place)
    assert (task.train_size, task.steps_per_epoch) == (48, 6)
    assert len(task.test.labels) == 20
    torch.manual_seed(0)
    model = task.model()
    loss, _ = task.loss(model, next(iter(task.epoch(0))))
    loss.backward()
    with torch.no_grad():
        found = task.evaluate(model.eval(), nullcontext)
    assert list(found.scores) == [one.metric.name for one in MEASURES[name]]
    assert next(iter(found.scores)) == task.metric.name
    paired = GLUE[name].second is not None
    assert bool(task.train.inputs[1].any()) == paired


def test_metrics_are_those_of_glue() -> None:
    names = {name: [one.metric.name for one in found] for name, found in MEASURES.items()}
    assert names == {
        "sst2": ["accuracy"],
        "mrpc": ["accuracy", "F1"],
        "cola": ["Matthews correlation", "accuracy"],
        "rte": ["accuracy"],
        "stsb": ["Spearman correlation", "Pearson correlation"],
    }


@pytest.mark.parametrize("name", GLUE)
def test_a_sketch_is_the_task_without_data(name: str, place: Path) -> None:
    drawn, task = sketch(recipe(name)), make(name, place)
    assert [p.shape for p in drawn.sample] == [p.shape for p in task.sample()]
    shapes = {key: p.shape for key, p in task.model().named_parameters()}
    assert shapes == {key: p.shape for key, p in drawn.model.named_parameters()}


def test_scores_are_trained_on_from_0_to_1(place: Path) -> None:
    labels = make("stsb", place).train.labels
    assert labels.dtype == torch.float32
    assert sorted(set(labels.tolist())) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_limits_keep_classes_balanced(place: Path) -> None:
    task = make("sst2", place, train_limit=16, test_limit=6)
    assert task.train.labels.bincount().tolist() == [8, 8]
    assert task.test.labels.bincount().tolist() == [3, 3]
    with pytest.raises(ValueError, match="21 test examples requested, but there are 20"):
        make("sst2", place, test_limit=21)


def test_a_vocabulary_file_is_used_where_there_is_one(place: Path) -> None:
    trained = make("rte", place)
    assert trained.facts["vocabulary"] == "trained on the training sentences"
    (place / "vocab").mkdir()
    (place / "vocab" / "vocab.txt").write_text("\n".join([*SPECIAL, "the", *WORDS, "a", "fell"]))
    task = make("rte", place)
    assert task.facts == {"vocabulary": str(place / "vocab" / "vocab.txt"), "pieces": 14}
    assert task.train.inputs[0][0].tolist()[:9] == [2, 5, 6, 13, 3, 12, 6, 3, 0]


def test_a_limit_changes_no_vocabulary(place: Path) -> None:
    whole, part = make("mrpc", place), make("mrpc", place, train_limit=8)
    assert whole.facts == part.facts
    rows = {tuple(row) for row in whole.train.inputs[0].tolist()}
    assert {tuple(row) for row in part.train.inputs[0].tolist()} <= rows


def test_where_the_data_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"train_limit": None, "test_limit": None}
    monkeypatch.setenv("DYNARANK_DATA", str(place))
    assert make_task(recipe("sst2"), None, seed=0, device=CPU, **limits).train_size == 48
    monkeypatch.delenv("DYNARANK_DATA")
    with pytest.raises(DataError, match=r"no location is given for GLUE's SST-2 .* \(1\) a folder"):
        make_task(recipe("sst2"), None, seed=0, device=CPU, **limits)


@pytest.mark.parametrize("options", [{"length": 4}, {"vocabulary": 5}, {"lenght": 9}])
def test_options_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="recipe 'glue-sst2', data_options: "):
        sketch(recipe("sst2", data_options=options))
