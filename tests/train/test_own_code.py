"""Own code is found by name, imported once for each state, and leaves no trace on sys.path."""

from __future__ import annotations

import functools
import os
import py_compile
import sys
from pathlib import Path

import pytest

from dynarank.train.own_code import importable, load_file, load_object, reference_to, source_digests
from dynarank.train.recipes import RecipeError


@pytest.mark.parametrize("form", ["net.py:width", "net:width"])
def test_each_folder_has_its_own_module_of_a_name(form: str, tmp_path: Path) -> None:
    before = list(sys.path)
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "helper_of_net.py").write_text(f"WIDTH = {number}\n")
        (folder / "net.py").write_text("def width():\n    from helper_of_net import WIDTH\n"
                                       "    return WIDTH\n")  # fmt: skip
    found = []
    for number in (1, 2, 1):
        folder = tmp_path / str(number)
        function = load_object(form, folder)
        with importable(folder):
            found.append(function())
    assert found == [1, 2, 1] and sys.path == before


def test_a_file_that_changes_is_imported_again(tmp_path: Path) -> None:
    (tmp_path / "inner_part.py").write_text("X = 1\n")
    (tmp_path / "net.py").write_text("from inner_part import X\n")
    one = load_object("net.py:X", tmp_path), source_digests(["net.py:X"], tmp_path)
    assert load_file(tmp_path / "net.py") is load_file(tmp_path / "net.py")
    (tmp_path / "inner_part.py").write_text("X = 2\n")
    two = load_object("net.py:X", tmp_path), source_digests(["net.py:X"], tmp_path)
    assert (one[0], two[0]) == (1, 2)
    assert one[1].keys() == two[1].keys() == {"net.py", "inner_part.py"}
    assert one[1]["net.py"] == two[1]["net.py"] and one[1] != two[1]


@pytest.mark.parametrize("what", ["None", "object()", "type('A', (), {'__slots__': ()})()"])
def test_own_code_may_put_anything_in_the_place_of_a_module(what: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(f"import sys\nsys.modules['not_there'] = {what}\nX = 1\n")
    try:
        assert load_object("net.py:X", tmp_path) == 1
        (tmp_path / "net.py").write_text("X = 2\n")
        assert load_object("net.py:X", tmp_path) == 2
    finally:
        sys.modules.pop("not_there", None)


@pytest.mark.parametrize("files", [("__init__.py",), ()], ids=["package", "folder"])
def test_each_folder_has_its_own_package_of_a_name(files: tuple[str, ...], tmp_path: Path) -> None:
    for number, initial in ((1, ()), (2, files), (3, ())):
        package = tmp_path / str(number) / "parts_of_mine"
        package.mkdir(parents=True)
        for name in initial:
            (package / name).touch()
        (package / "part.py").write_text(f"WIDTH = {number}\n")
    found = [load_object("parts_of_mine.part:WIDTH", tmp_path / str(n)) for n in (1, 2, 3, 1)]
    assert found == [1, 2, 3, 1]


@pytest.mark.parametrize("changed", ["net.py", "inner_part.py", "pack_of_mine/part.py"])
def test_a_compiled_copy_of_equal_time_and_size_is_not_run(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python takes a ``.pyc`` for its source if the size and the second of the edit are equal."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    finders = list(sys.meta_path)
    for folder in (tmp_path, tmp_path / "pack_of_mine"):
        folder.mkdir(exist_ok=True)
    (tmp_path / "pack_of_mine/part.py").write_text("Z = 1\n")
    (tmp_path / "inner_part.py").write_text("Y = 1\n")
    (tmp_path / "net.py").write_text("X = 1\nfrom inner_part import Y\n"
                                     "from pack_of_mine.part import Z\n")  # fmt: skip
    for path in tmp_path.rglob("*.py"):
        os.utime(path, (1, 1))
        py_compile.compile(str(path))
    assert sum(getattr(load_file(tmp_path / "net.py"), name) for name in "XYZ") == 3
    path = tmp_path / changed
    path.write_text(path.read_text().replace("1", "2"))
    os.utime(path, (1, 1))
    assert sum(getattr(load_file(tmp_path / "net.py"), name) for name in "XYZ") == 4
    assert sys.meta_path == finders


def test_packages_and_relative_imports_are_part_of_the_digest(tmp_path: Path) -> None:
    package = tmp_path / "pack_of_mine"
    package.mkdir()
    for name, text in {
        "__init__.py": "", "deep.py": "Y = 1\n", "unused.py": "",
        "nets.py": "from .deep import Y\nimport json, torch\n",
    }.items():  # fmt: skip
        (package / name).write_text(text)
    found = source_digests(["pack_of_mine.nets:Y"], tmp_path)
    assert found.keys() == {"pack_of_mine/deep.py", "pack_of_mine/nets.py"}
    assert source_digests(["torch.optim:Adam", "json:dumps"], tmp_path) == {}


def test_a_file_may_have_the_name_of_a_known_module(tmp_path: Path) -> None:
    for name in ("random.py", "torch.py", "my net.py"):
        (tmp_path / name).write_text("HERE = True\n")
        assert load_object(f"{name}:HERE", tmp_path)
    import torch

    assert hasattr(torch, "Tensor")


@pytest.mark.parametrize(
    ("text", "reference", "told"),
    [
        ("", "absent.py:f", "absent.py is not there; files are relative to the recipe's folder"),
        ("", "absent_module:f", "'absent_module' is not there: neither in the recipe's folder"),
        ("", "torch.absent:f", "'torch.absent' is not there"),
        ("", "imgfolder:pets", "or did you mean the reader 'imagefolder:'"),
        ("import absent_module", "bad.py:f", "raised ModuleNotFoundError: No module.*bad.py, li"),
        ("import absent_module", "bad:f", "raised ModuleNotFoundError: No module.*bad.py, line 1"),
        ("x = (", "bad.py:f", "raised SyntaxError.*bad.py, line 1"),
        ("\n1 / 0", "bad.py:f", "raised ZeroDivisionError: division by zero .*bad.py, line 2"),
        ("class A:\n    pass", "bad.py:A.f", "A has no 'f'|has no 'f'"),
        ("def g(): pass", "bad.py:f", "bad.py has no 'f'; it has g"),
    ],
)
def test_what_is_not_there(text: str, reference: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(text)
    before = list(sys.path)
    with pytest.raises(RecipeError, match=told):
        load_object(reference, tmp_path)
    assert sys.path == before and ("has no" in told or "bad" not in sys.modules)


def test_a_function_that_can_be_named_again(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("class Net:\n    def make(): ...\ndef f():\n    def g(): ...\n"
                                     "    return g\nh = lambda: 1\n")  # fmt: skip
    module = load_file(tmp_path / "net.py")
    assert reference_to(module.f, tmp_path) == "net.py:f"
    assert reference_to(module.Net.make, tmp_path) == "net.py:Net.make"
    assert reference_to(sorted, tmp_path) == "builtins:sorted"
    for value in (module.f(), module.h, functools.partial(module.f), lambda: 0):
        with pytest.raises(RecipeError, match="cannot be named again"):
            reference_to(value, tmp_path)
