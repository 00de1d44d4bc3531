"""Own recipes: TOML and Python files, and what is said of those that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_recipes import own, write

from dynarank.train.recipes import Recipe, RecipeError, load_recipe

FOUR = 'data = "digits"\nmodel = "mlp"\nepochs = 3\nlearning_rate = 0.1\n'


def test_four_lines_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(FOUR)
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.folder, recipe.sources) == ("my", str(tmp_path), None)
    assert (recipe.batch_size, recipe.lr_schedule, recipe.layers) == (64, "cosine", None)
    assert recipe.schedules == ("full-rank", "low-rank", "dynamic-rank")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


WRONG = {
    "lerning_rate = 1": "line 5, lerning_rate: unknown key; did you mean 'learning_rate'",
    "lr = 1": "line 5, lr: unknown key; did you mean 'learning_rate'",
    'batch_size = "64"': r"line 5, batch_size: .*integer, got '64'",
    "batch_size = true": r"line 5, batch_size: .*integer, got True",
    "clip_norm = -1.0": "clip_norm: .*greater than 0, got -1.0",
    'lr_schedule = "cosin"': "lr_schedule is one of .*, got 'cosin'; did you mean 'cosine'",
    'optimizer = "adam"': "optimizer is one of sgd, adamw, or file.py:function, got 'adam'",
    'schedules = ["low-rnak"]': "low-rnak.*did you mean 'low-rank'",
    'rank = "half"': "line 5, rank: a rank is a number",
    'rank = { value = 0.5, off = "out" }': "line 5, rank.off",
    'loss = "mse"': "loss has no effect here: it is for own data",
    "num_workers = 2": "num_workers has no effect here",
    "higher_is_better = true": "higher_is_better has no effect here",
    'folder = "x"': "folder is found by itself",
    "[model_options]\nwidht = 3": "",
    "epochs = 4": "Cannot overwrite a value|not TOML",
    "x = [": "this is not TOML",
    'model_options = "wide"': "model_options: .*dictionary, got 'wide'",
    'name = "a/b"': "name",
}


@pytest.mark.parametrize("line", WRONG)
def test_errors_name_file_line_key_and_the_nearest_one(line: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(FOUR + line)
    if not WRONG[line]:  # its network has the last word, when it is made
        assert load_recipe(str(path)).model_options == {"widht": 3}
        return
    with pytest.raises(RecipeError, match=WRONG[line]) as error:
        load_recipe(str(path))
    assert str(path) in str(error.value) and "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "data: required, but missing; .*model: required"),
        (FOUR.replace("digits", "digit"), "data is one of digits, .*hf:..., .*mean 'digits'"),
        (FOUR.replace("mlp", "mpl"), "model is one of .*or file.py:function, got 'mpl'; did you"),
        (FOUR.replace("mlp", "absent.py:f"), r"line 2, model: .*absent.py is not there"),
        (
            FOUR.replace("digits", "cvs:a.csv"),
            "unknown reader 'cvs'; did you mean 'csv'",
        ),
    ],
)
def test_what_is_missing_or_unknown(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=told):
        load_recipe(str(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is not there; `dynarank init .*absent.toml`"):
        load_recipe(str(tmp_path / "absent.toml"))
    with pytest.raises(RecipeError, match=r"absent.py is not there"):
        load_recipe(str(tmp_path / "absent.py"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read as TOML in UTF-8"):
        load_recipe(str(tmp_path / "bytes.toml"))
    with pytest.raises(RecipeError, match=r"unknown recipe 'digts'.*did you mean 'digits'"):
        load_recipe("digts")


PYTHON = """
from net import Net, late, margin, tensors
from dynarank.train.recipes import Recipe

settings = dict(data=tensors, model=Net, loss=margin, metric="accuracy", epochs=2,
                learning_rate=0.1, schedules=["low-rank", late], rank=8)
recipe = settings
def made(): return settings
def typed(): return Recipe(data="net.py:tensors", model="net.py:Net", epochs=2, learning_rate=0.1)
one = typed()
hidden = settings | {"loss": lambda output, target: output.mean()}
number = 3
def broken(): return settings["x"]
"""


def test_python_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    (tmp_path / "mine.py").write_text(PYTHON)
    path = str(tmp_path / "mine.py")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.model, recipe.loss) == ("mine", "net.py:Net", "net.py:margin")
    assert recipe.schedule_names == ("low-rank", "late")
    assert recipe.sources is not None and recipe.sources.keys() == {"net.py"}
    assert load_recipe(f"{path}:made") == recipe == load_recipe(f"{path}:settings")
    assert load_recipe(f"{path}:typed") == load_recipe(f"{path}:one")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine:made") == recipe
    for name, told in {
        "hidden": "mine.py, loss: .*cannot be named again",
        "number": "must be a Recipe, a dict of its settings or a function",
        "broken": "raised KeyError: 'x'",
        "absent": "mine.py has no 'absent'",
    }.items():
        with pytest.raises(RecipeError, match=told):
            load_recipe(f"{path}:{name}")


def test_settings_are_checked_as_a_file_is(tmp_path: Path) -> None:
    recipe = own(tmp_path)
    changed = recipe.with_settings({"rank.value": 0.25, "model_options.width": 32, "epochs": 5})
    assert (changed.rank.value, changed.model_options) == (0.25, {"width": 32})  # type: ignore[union-attr]
    assert changed.sources == recipe.sources
    assert recipe.with_settings({"model": "mlp"}).sources == recipe.sources  # of the data
    for asked, told in [
        ({"learning_rat": 1}, "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ({"lr": 1}, "did you mean 'learning_rate'"),
        ({"sources": {}}, "unknown setting 'sources'"),
        ({"epochs.x": 1}, "epochs is no table"),
        ({"epochs": 0}, "setting 'epochs': .*greater than or equal to 1, got 0"),
        ({"model": "net.py:Nat"}, "net.py has no 'Nat'"),
        ({"optimizer": "net.py:lion", "momentum": 0.5}, "momentum has no effect here"),
        ({"lr_schedule": "net.py:halved", "warmup": 0.1}, "warmup has no effect here"),
        ({"metric": "net.py:worst"}, "higher_is_better must be true or false"),
        ({"schedules": ["net.py:late", "net.py:late"]}, "two schedules have the name 'late'"),
        ({"optimizer_options.lr": 1}, "optimizer_options has 'lr': set learning_rate"),
        ({"augment": True}, "augment has no effect here"),
    ]:
        with pytest.raises(RecipeError, match=told):
            recipe.with_settings(asked)


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(list(Recipe.model_fields)) | st.text(), json, max_size=4))
def test_any_settings_are_taken_or_refused_by_name(asked: dict[str, Any]) -> None:
    base = load_recipe("digits")
    try:
        changed = base.with_settings(asked)
    except RecipeError:
        return
    assert Recipe.model_validate(changed.model_dump(mode="json")) == changed
