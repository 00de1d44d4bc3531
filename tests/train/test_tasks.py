"""The tasks of recipes, and their sketches without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynarank.train.recipes import load_recipe, recipe_names
from dynarank.train.tasks import make_task, sketch

CPU = torch.device("cpu")


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
    with pytest.raises(ValueError, match="361 test images requested, but there are 360"):
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
