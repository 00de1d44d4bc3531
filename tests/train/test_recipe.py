"""Every setting of a recipe has an effect or is refused, wherever it is set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from own_recipes import write
from torch import nn

from dynarank.train.optimizers import make_optimizer
from dynarank.train.rates import make_lr_scheduler
from dynarank.train.recipe import LR_SCHEDULES, OPTIMIZERS
from dynarank.train.recipes import Recipe, RecipeError, load_recipe, recipe_names
from dynarank.train.registry import DATA

STEPS = 40  # and epochs, so that epochs are steps
OPTIONS = {"sgd": {"nesterov": True}, "adamw": {"amsgrad": True}, "net.py:lion": {"scale": 2.0}}
NEEDED: dict[str, dict[str, Any]] = {
    "multistep": {"decay_at": (20, 30)},
    "wsd": {"decay_at": (30,)},
    "onecycle": {"warmup": 0.3},
}
TRAINS: dict[str, Any] = {
    "learning_rate": 0.3,
    "momentum": 0.5,
    "betas": (0.8, 0.9),
    "weight_decay": 0.01,
    "warmup": 0.2,
    "decay_at": (25,),
    "decay_factor": 0.5,
    "final_rate": 0.2,
}
"""Another value of each setting that an optimizer or an LR schedule may read."""
CHOICES = {"optimizer", "optimizer_options", "lr_schedule"}
ELSEWHERE: dict[str, Any] = {
    "name": "another",
    "summary": "another",
    "data": "shifted-digits",
    "data_options": {"a": 1},
    "num_workers": 1,
    "steps_per_epoch": 3,
    "model": "resnet8",
    "model_options": {"width": 8},
    "layers": ("*conv*",),
    "loss": "mse",
    "metric": "f1",
    "higher_is_better": True,
    "schedules": ("low-rank",),
    "batch_size": 3,
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "augment": True,
    "shuffle": "once",
    "init": "published",
    "rank": 3,
    "decomposition": "tucker",
    "inflate": 1.0,
    "deflate": 3.0,
    "alpha": 2.0,
    "execution": "merged",
    "budget": 0.4,
    "moments": "reset",
    "rewarmup": 3,
    "recalibrate_batch_norms": False,
    "as_published": {"shuffle": "once"},
}
"""Another value of each setting that neither an optimizer nor a named LR schedule reads."""
OF_THE_FILE = {"folder", "sources", "epochs"}


def test_every_setting_is_in_one_of_the_tables() -> None:
    tables = [set(TRAINS), CHOICES, set(ELSEWHERE), OF_THE_FILE]
    assert set().union(*tables) == set(Recipe.model_fields)
    assert sum(map(len, tables)) == len(Recipe.model_fields)
    read = [*OPTIMIZERS.values(), *LR_SCHEDULES.values()]
    assert {name for names in read for name in names} <= set(TRAINS)


def settings(folder: Path, optimizer: str, lr_schedule: str) -> dict[str, Any]:
    base = {"data": "digits", "model": "mlp", "epochs": STEPS, "learning_rate": 0.1}
    kinds = {"optimizer": optimizer, "lr_schedule": lr_schedule, "folder": str(folder)}
    return {**base, **kinds, **NEEDED.get(lr_schedule, {})}


def trained_with(recipe: Recipe) -> tuple[Any, ...]:
    """The optimizer's settings and the learning rate of each step."""
    optimizer = make_optimizer(recipe, nn.Linear(2, 2))
    given = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    scheduler, rates = make_lr_scheduler(recipe, optimizer, STEPS), list[float]()
    for _ in range(STEPS - 1):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return type(optimizer), given, rates


@pytest.mark.parametrize("lr_schedule", [*LR_SCHEDULES, "net.py:halved"])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "net.py:lion"])
def test_a_setting_is_refused_where_it_does_not_change_what_is_trained(
    optimizer: str, lr_schedule: str, tmp_path: Path
) -> None:
    write(tmp_path)
    base = Recipe.model_validate(settings(tmp_path, optimizer, lr_schedule))
    plain = trained_with(base)
    for key, value in {**TRAINS, "optimizer_options": OPTIONS[optimizer]}.items():
        without_effect = trained_with(base.model_copy(update={key: value})) == plain
        try:
            base.with_settings({key: value})
            refused = False
        except RecipeError as error:
            refused = True
            assert f"{key} has no effect here: it is for" in str(error)
        assert refused == without_effect, (key, optimizer, lr_schedule)


def test_what_others_read_reaches_neither_optimizer_nor_rate(tmp_path: Path) -> None:
    base = Recipe.model_validate(settings(tmp_path, "sgd", "multistep"))
    for key, value in ELSEWHERE.items():
        assert trained_with(base.model_copy(update={key: value})) == trained_with(base), key


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("text-gpt", "shuffle", "once"), ("text-gpt", "augment", True), ("imdb-lstm", "augment", True),
     ("glue-stsb", "label_smoothing", 0.1), ("glue-rte", "steps_per_epoch", 3)],
)  # fmt: skip
def test_settings_that_the_data_has_no_use_for(name: str, key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"{key} has no effect here: it is for"):
        load_recipe(name).with_settings({key: value})


def test_a_refused_setting_says_where_it_works_and_how_to_go_on() -> None:
    told = (
        r"decay_at has no effect here: it is for lr_schedule multistep, wsd, not for 'cosine'; got "
        r"\[20.0, 26.0\], leave it out, or set it to \[\]"
    )
    digits = load_recipe("digits")
    with pytest.raises(RecipeError, match=told):
        digits.with_settings({"lr_schedule": "cosine"})
    assert digits.with_settings({"lr_schedule": "cosine", "decay_at": []}).decay_at == ()


@pytest.mark.parametrize("first", ["data", "decay_at", "epochs", None])
def test_a_setting_means_what_it_means_in_the_file(first: str | None, tmp_path: Path) -> None:
    """In whatever order, and through what is stored of a recipe on the way."""
    write(tmp_path)
    base = {"data": "digits", "model": "mlp", "epochs": 4, "learning_rate": 0.1}
    other = {**TRAINS, **ELSEWHERE, "data": "net.py:loaders", "decay_at": (1,), "epochs": 3,
             "optimizer": "adamw", "lr_schedule": "linear"}  # fmt: skip
    given = {"folder": str(tmp_path), **base, **({first: other[first]} if first else {})}
    recipe = Recipe.model_validate(given)
    for key, value in other.items():
        assert found(recipe, {key: value}) == in_file({**given, key: value}), key


def found(recipe: Recipe, changed: dict[str, Any]) -> dict[str, Any] | None:
    try:
        return recipe.with_settings(changed).model_dump(exclude={"sources"})
    except RecipeError:
        return None


def in_file(given: dict[str, Any]) -> dict[str, Any] | None:
    try:
        return Recipe.model_validate(given).model_dump(exclude={"sources"})
    except ValueError:
        return None


def test_defaults_that_follow_are_those_of_the_last_settings() -> None:
    recipe = load_recipe("text-gpt").with_settings({"lr_schedule": "linear"})
    assert recipe.with_settings({"final_rate": 0.2}).lr_schedule == "linear"  # chosen: it stays
    four = Recipe.model_validate(
        {"data": "digits", "model": "mlp", "epochs": 4, "learning_rate": 0.1}
    )
    stepped = four.with_settings({"decay_at": [1]})
    assert (four.lr_schedule, stepped.lr_schedule) == ("cosine", "multistep")
    assert stepped.with_settings({"decay_at": []}) == four


def test_recipes_that_ship_load_with_and_without_their_published_settings() -> None:
    for recipe in map(load_recipe, recipe_names()):
        assert recipe.data in DATA and (not recipe.as_published or recipe.published())
