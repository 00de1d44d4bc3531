"""The registries of data sets and networks, and the tasks that they make."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from dynarank.train.recipes import Recipe, load_recipe, recipe_names
from dynarank.train.tasks import DATA, MODELS, build_model, make_task, sketch

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", DATA)
def test_every_data_set_has_a_module_that_makes_its_task(name: str) -> None:
    module = import_module(DATA[name])
    assert callable(module.make_task) and callable(module.sketch)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_where_the_registry_says(name: str) -> None:
    assert callable(import_module(MODELS[name]).MODELS[name])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_sketched_without_data(name: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("DYNARANK_DATA", raising=False)
    drawn = sketch(load_recipe(name))
    assert all(p.is_meta for p in drawn.model.parameters())


def test_the_limits_choose_balanced_examples_of_either_part() -> None:
    recipe = load_recipe("digits")
    task: Any = make_task(recipe, seed=0, device=CPU, train_limit=128, test_limit=30)
    assert task.train_size == len(task.data.train_labels) == 128 and task.steps_per_epoch == 2
    assert task.data.test_labels.bincount().tolist() == [3] * 10
    whole: Any = make_task(recipe, seed=0, device=CPU)
    assert len(whole.data.test_labels) == 360
    with pytest.raises(ValueError, match="361 test images were asked for; there are 360"):
        make_task(recipe, seed=0, device=CPU, test_limit=361)


def test_the_sample_is_what_the_sketch_says() -> None:
    recipe = load_recipe("digits")
    task = make_task(recipe, seed=0, device=CPU, train_limit=128)
    assert task.sample().shape == sketch(recipe).sample.shape


def test_an_epoch_is_a_pure_function_of_seed_and_epoch() -> None:
    recipe = load_recipe("digits")
    one, two, other = (make_task(recipe, seed=seed, device=CPU) for seed in (1, 1, 2))
    labels = [torch.cat([y for _, y in task.epoch(3)]) for task in (one, two, other)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])


def test_options_reach_the_network_and_unknown_ones_are_refused() -> None:
    drawn = build_model("wrn-16-4", classes=3, dropout=0.25)
    rates = {m.p for m in drawn.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    with pytest.raises(ValueError, match=r"'digits-net' was asked for with classes, drop.*drop"):
        build_model("digits-net", classes=10, drop=0.1)


@pytest.mark.parametrize(("field", "known"), [("data", "cifar10"), ("model", "resnet20")])
def test_an_unknown_name_is_refused_with_those_there_are(field: str, known: str) -> None:
    values = load_recipe("digits").model_dump() | {field: "x"}
    with pytest.raises(ValueError, match=rf"{field} is one of .*{known}.*, got 'x'"):
        Recipe.model_validate(values)
