"""The registries of data sets and networks."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from dynarank.train.recipes import Recipe, load_recipe
from dynarank.train.registry import DATA, MODELS, build_model


@pytest.mark.parametrize("name", DATA)
def test_every_data_set_has_a_module_that_makes_its_task(name: str) -> None:
    module = import_module(DATA[name])
    assert callable(module.make_task) and callable(module.sketch)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_where_the_registry_says(name: str) -> None:
    assert callable(import_module(MODELS[name]).MODELS[name])


def test_options_reach_the_network_and_unknown_ones_are_refused() -> None:
    drawn = build_model("wrn-16-4", classes=3, dropout=0.25)
    rates = {m.p for m in drawn.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    with pytest.raises(ValueError, match=r"'digits-net' does not accept classes, drop.*drop"):
        build_model("digits-net", classes=10, drop=0.1)


@pytest.mark.parametrize(("field", "known"), [("data", "cifar10"), ("model", "resnet20")])
def test_an_unknown_name_is_refused_with_those_there_are(field: str, known: str) -> None:
    values = load_recipe("digits").model_dump() | {field: "x"}
    with pytest.raises(ValueError, match=rf"{field} is one of .*{known}.*, got 'x'"):
        Recipe.model_validate(values)
