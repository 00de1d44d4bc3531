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

LAZY = ["dynarank", "dynarank.decompositions", "dynarank.schedules"]


@pytest.mark.parametrize("name", LAZY)
def test_a_type_checker_sees_what_there_is(name: str) -> None:
    package = import_module(name)
    place = Path(str(package.__file__))
    stub = place.with_suffix(".pyi")
    nodes = ast.walk(ast.parse((stub if stub.exists() else place).read_text(encoding="utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: str(node.module) for node in imports for alias in node.names}
    assert set(package.__all__) == set(package._HOMES) and set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        found = getattr(package, public)
        if public in seen:
            assert found is getattr(import_module(seen[public]), public)
        else:
            assert stub.exists(), f"{public} is not imported for type checkers"


def test_star_pickle_and_help() -> None:
    names: dict[str, object] = {}
    exec("from dynarank import *", names)
    assert set(dr.__all__) <= names.keys()
    assert pickle.loads(pickle.dumps(dr.LowRank)) is dr.LowRank
    assert pickle.loads(pickle.dumps(dr.schedules.decay)) is dr.schedules.Decay
    assert "class RankScheduler" in pydoc.plain(pydoc.render_doc(dr))


def test_folders_are_reached_without_importing_them() -> None:
    code = (
        "import sys, dynarank as dr\n"
        "print(dr.__version__, 'torch' in sys.modules, 'dynarank.forms' in sys.modules)\n"
        "print(dr.layers.register_layer.__name__, dr.surgery.verbs.merge is dr.merge)"
    )
    words = [sys.executable, "-c", code]
    path = str(Path(dr.__file__).parents[1])
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": path})
    expected = [dr.__version__, "False", "False", "register_layer", "True"]
    assert done.stdout.split() == expected, done.stderr


@pytest.mark.parametrize(
    ("where", "wrong", "near"),
    [
        ("dynarank", "faktorize", "'factorize'"),
        ("dynarank", "lowrank", "'LowRank'"),
        ("dynarank", "zzz", None),
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
