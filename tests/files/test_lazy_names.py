"""Lazy names: the public ones of the package, and those of its lazy folders."""

from __future__ import annotations

import ast
import pickle
import pydoc
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dynarank as dr


@pytest.mark.parametrize("name", ["dynarank", "dynarank.decompositions", "dynarank.schedules"])
def test_what_a_type_checker_sees_is_what_there_is(name: str) -> None:
    package = import_module(name)
    place = Path(package.__file__ or "")
    stub = place.with_suffix(".pyi")
    tree = ast.parse((stub if stub.exists() else place).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "pkgutil")
        for alias in node.names
    }
    for public in package.__all__:
        assert public in dir(package)
        value = getattr(package, public)
        if public in seen and seen[public] != "dynarank":
            home = import_module(str(seen[public]))
            assert value is getattr(home, public, None) or value is sys.modules.get(
                f"{seen[public]}.{public}"
            )
        else:
            assert stub.exists() or public == "schedules"
    assert set(package.__all__) == set(package._HOMES)


def test_star_pickle_and_help() -> None:
    names: dict[str, object] = {}
    exec("from dynarank import *", names)
    assert set(dr.__all__) <= names.keys()
    assert pickle.loads(pickle.dumps(dr.LowRank)) is dr.LowRank
    assert pickle.loads(pickle.dumps(dr.schedules.decay)) is dr.schedules.Decay
    assert "class RankScheduler" in pydoc.plain(pydoc.render_doc(dr))


def test_folders_are_reached_without_importing_them() -> None:
    code = (
        "import sys, dynarank as dr; assert 'torch' not in sys.modules;"
        "print(dr.__version__, dr.schedules.decay().name if 0 else '', 'torch' in sys.modules,"
        "dr.layers.register_layer.__name__, dr.train.recipes.load_recipe('digits').name)"
    )
    path = str(Path(dr.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [dr.__version__, "False", "register_layer", "digits"]


@pytest.mark.parametrize(
    ("where", "wrong", "near"),
    [
        ("dynarank", "faktorize", "'factorize'"),
        ("dynarank", "lowrank", "'LowRank'"),
        ("dynarank", "register_layer", None),
        ("dynarank.schedules", "dekay", "'decay'"),
        ("dynarank.decompositions", "get_decompositon", "'get_decomposition'"),
    ],
)
def test_a_wrong_name_is_an_error_with_the_nearest_one(
    where: str, wrong: str, near: str | None
) -> None:
    with pytest.raises(AttributeError, match=f"module '{where}' has no attribute '{wrong}'") as e:
        getattr(import_module(where), wrong)
    assert (f"did you mean {near}?" in str(e.value)) == (near is not None)
    assert not hasattr(import_module(where), wrong)
