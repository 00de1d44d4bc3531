"""The architecture: folders import downward only, small functions, a light and CUDA-free import."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import dynarank

SRC = Path(dynarank.__file__).parent
TESTS = Path(__file__).parent
ROOT = TESTS.parent

# One folder (or module) a line, lowest first: each may import those above it in this list.
ORDER = [
    "files",
    "forms",
    "form_data",
    "distributed",
    "decompositions",
    "layers",
    "surgery",
    "schedules",
    "monitors",
    "factors",
    "cost",
    "allocation",
    "scheduler",
    "planning",
    "contrib",
    "checkpoint",
    "export",
    "records",
    "sinks",
    "report",
    "recording",
    "integrations",
    "train",
    "cli",
    "__main__",
]
# Narrower than the order: decompositions know no modules, layers no optimizer, schedules no model,
# surgery no time, reports no model.
FORBIDDEN = {
    "decompositions": {"torch.nn.modules", "torch.optim"},
    "layers": {"torch.optim"},
    "schedules": {"torch", "dynarank.layers", "dynarank.surgery"},
    "report": {"dynarank.layers", "dynarank.surgery"},
}
# These import no third-party package but torch.
ONLY_TORCH = ORDER[: ORDER.index("records")]
# One file a library: for its layers, where the user has imported it already; for its file format.
ADAPTERS = {"hf_conv1d.py", "onnx.py", "peft.py", "tensors.py", "weight_files.py"}
AT_THE_TOP = 8  # modules


def unit_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def python_files() -> list[Path]:
    return sorted(p for p in SRC.rglob("*.py") if unit_of(p) != "__init__")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module a file imports, wherever in the file, type-checking imports included."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(found)


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def violations() -> Iterator[str]:
    """Imports that point upward, by folder."""
    for path in python_files():
        unit = unit_of(path)
        if unit not in ORDER:
            yield f"{unit} has no place in the order of folders"
            continue
        for name in imports(path):
            if name == "dynarank":
                yield f"{path} imports the package's root"
            elif name.startswith("dynarank."):
                other = name.split(".")[1]
                if other not in ORDER or ORDER.index(other) > ORDER.index(unit):
                    yield f"{path.relative_to(SRC)} imports {name}, which lies above it"


def file_graph() -> dict[str, set[str]]:
    """The files that each file imports, by module name."""
    names = {module_name(path): path for path in python_files()}
    return {
        name: {other for other in imports(path) if other in names and other != name}
        for name, path in names.items()
    }


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """What is left after removing files that import nothing that is left: a cycle and above it."""
    left = dict(graph)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_imports_point_down() -> None:
    assert list(violations()) == []


def test_contributing_lists_the_folders_in_their_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == ORDER[:-1]


def test_no_file_imports_itself_in_a_circle() -> None:
    # A package's __init__ only re-exports: who imports a submodule does not depend on it.
    graph = {
        n: o for n, o in file_graph().items() if not (SRC.parent / n.replace(".", "/")).is_dir()
    }
    assert cycle(graph) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]


def test_units_know_only_what_they_may() -> None:
    for path in python_files():
        unit = unit_of(path)
        for name in imports(path):
            for barred in FORBIDDEN.get(unit, set()):
                assert name != barred and not name.startswith(barred + "."), f"{path}: {name}"
            root = name.split(".")[0]
            known = root in ("torch", "dynarank") or root in sys.stdlib_module_names
            assert known or unit not in ONLY_TORCH or path.name in ADAPTERS, f"{path}: {root}"


def test_functions_stay_small() -> None:
    for path in python_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                assert length <= 45, f"{path}: {node.name} has {length} lines"


def test_the_top_of_the_package_is_small() -> None:
    assert len(list(SRC.glob("*.py"))) <= AT_THE_TOP
    assert len(dynarank.__all__) <= 33
    assert all(hasattr(dynarank, name) for name in dynarank.__all__)


def test_tests_lie_where_what_they_test_lies() -> None:
    """In a folder of the same name; a test named after a module, beside that module."""
    modules = {(path.parent.relative_to(SRC), path.stem) for path in python_files()}
    for path in sorted(TESTS.rglob("test_*.py")):
        folder, name = path.parent.relative_to(TESTS), path.stem.removeprefix("test_")
        home = ROOT if folder.parts[:1] == ("benchmarks",) else SRC
        assert (home / folder).is_dir(), f"{path}: no folder {folder} in the package"
        homes = {home for home, module in modules if module == name}
        assert not homes or folder in homes, f"{path}: {name} lies in {homes}"
        shared = [one for one in imports(path) if ".test_" in one or one.startswith("test_")]
        assert not shared, f"{path}: put what it shares with {shared} into a module of tests/"


def test_files_that_documents_name_are_there() -> None:
    named = re.compile(r"(?:tests|src|docs|examples)/[\w/.-]+\.(?:py|md)")
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *SRC.rglob("*.py")]:
        for name in named.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page}: {name}"


def _python(code: str) -> str:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_importing_never_touches_cuda_nor_the_extras() -> None:
    code = """
import torch
def refuse(*a, **k): raise AssertionError("CUDA was touched")
for name in ("init", "_lazy_init", "is_available", "current_device", "device_count"):
    setattr(torch.cuda, name, refuse)
import sys, dynarank
for name in {*dynarank.__all__} - {"Recorder"}:  # whose records are pydantic's
    getattr(dynarank, name)
print([m for m in ("matplotlib", "sklearn", "datasets", "pydantic", "typer", "rich", "transformers",
                   "accelerate", "lightning", "peft", "onnx") if m in sys.modules])
"""
    assert _python(code) == "[]"


@pytest.mark.slow
def test_importing_adds_little_to_torch() -> None:
    """Under 20% on top of torch, each in a process of its own; once in up to five pairs."""
    code = """
import time
a = time.perf_counter()
import torch
b = time.perf_counter()
from dynarank import RankScheduler, factorize, load, schedules
schedules.decay
print((time.perf_counter() - b) / (b - a))
"""
    _python(code)  # fill the bytecode caches
    assert any(float(_python(code)) < 0.2 for _ in range(5))
