"""The direction of imports, the size of files, and what importing dynarank costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dynarank

SRC = Path(dynarank.__file__).parent

# Each unit may import units of lower layers, and, on its own layer, those named after it.
LAYERS: list[dict[str, set[str]]] = [
    {"forms": set(), "readings": set()},
    {"decompositions": set()},
    {"layers": set(), "records": set()},
    {
        "spectrum": set(),
        "penalties": set(),
        "survey": set(),
        "edit": {"survey"},
        "selection": {"survey"},
        "present": {"survey", "selection"},
        "knapsack": set(),
        "probe": set(),
    },
    {
        "transport": {"moments", "gradients"},
        "moments": set(),
        "gradients": set(),
        "cost": set(),
        "monitors": {"layer_values", "pace"},
        "noise": {"gradients", "noise_estimate", "pace", "undisturbed"},
        "noise_estimate": set(),
        "undisturbed": set(),
        "layer_values": set(),
        "pace": set(),
        "heatmap": set(),
        "weights": {"weight_files"},
        "weight_files": {"tensor_file"},
        "tensor_file": set(),
        "schedules": set(),
        "regularizers": set(),
        "initialization": set(),
        "factor_rates": set(),
        "calibration": set(),
    },
    {"surgery": set(), "planning": set(), "ranking": set()},
    {"stopwatch": set()},
    {"measure": set()},
    {"budget": set()},
    {"rehearsal": set()},
    {
        "fitting": {"preflight", "memory_fitting"},
        "memory_fitting": {"preflight"},
        "preflight": set(),
        "forecast": set(),
        "rewarm": set(),
        "norms": set(),
    },
    {"scheduler": set(), "sinks": set()},
    {"train": set(), "report": set()},
    {"cli": set()},
]
# Narrower than the layers say: decompositions know no module, layers no optimizer, schedules and
# reports no model, surgery no time.
FORBIDDEN = {
    "decompositions": {"torch.nn.modules", "torch.optim", "dynarank.forms"},
    "layers": {"torch.optim"},
    "spectrum": {"torch.nn", "dynarank.layers"},
    "schedules": {"torch", "dynarank.layers", "dynarank.survey", "dynarank.edit"},
    "surgery": {"dynarank.schedules"},
    "transport": {"dynarank.schedules"},
    "report": {"dynarank.layers", "dynarank.survey", "dynarank.edit", "dynarank.surgery"},
}
# The core imports no third-party package but torch: the others are for records, files and the CLI.
CORE_ONLY_TORCH = {
    "budget", "calibration", "cost", "decompositions", "edit", "factor_rates", "fitting",
    "forecast", "forms", "heatmap", "initialization", "knapsack", "layer_values", "layers",
    "measure", "memory_fitting", "monitors", "noise", "noise_estimate", "norms", "pace",
    "penalties", "planning", "preflight", "present", "probe", "ranking", "readings",
    "regularizers", "rehearsal", "rewarm", "scheduler", "schedules", "selection", "spectrum",
    "stopwatch", "surgery", "survey", "transport", "undisturbed",
}  # fmt: skip

# Files that speak to a host, imported only where the host is imported already.
ADAPTERS = {"hf_conv1d.py"}


def unit_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return found


FILES = sorted(p for p in SRC.rglob("*.py") if unit_of(p) != "__init__")
RANK = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    assert unit in RANK, f"{unit} has no place in the layout; give it one here and in the design"
    for name in imports(path):
        assert name != "dynarank", f"{path} imports the package's root"
        if not name.startswith("dynarank."):
            continue
        other = name.split(".")[1]
        beside = LAYERS[RANK[unit]][unit]
        allowed = other == unit or other in beside or RANK.get(other, 99) < RANK[unit]
        assert allowed, f"{unit} imports {other}, which does not lie below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_units_know_only_what_they_may(path: Path) -> None:
    for name in imports(path):
        for barred in FORBIDDEN.get(unit_of(path), set()):
            assert name != barred and not name.startswith(barred + "."), f"{path} imports {name}"
        if unit_of(path) in CORE_ONLY_TORCH:
            root = name.split(".")[0]
            known = root in ("torch", "dynarank") or root in sys.stdlib_module_names
            known = known or path.name in ADAPTERS
            assert known, f"the core imports {root}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300, f"{path} is too long to find its idea"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert length <= 45, f"{path}: {node.name} has {length} lines"


def test_the_public_names_are_few_and_there() -> None:
    assert len(dynarank.__all__) <= 20
    assert all(hasattr(dynarank, name) for name in dynarank.__all__)


def _python(code: str) -> str:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.strip()


def test_importing_never_touches_cuda_nor_the_extras() -> None:
    code = """
import torch
def refuse(*a, **k): raise AssertionError("CUDA was touched")
for name in ("init", "_lazy_init", "is_available", "current_device", "device_count"):
    setattr(torch.cuda, name, refuse)
import sys, dynarank
print([m for m in ("matplotlib", "sklearn", "datasets", "pydantic", "typer", "rich", "transformers")
       if m in sys.modules])
"""
    assert _python(code) == "[]"


def test_importing_adds_little_to_torch() -> None:
    """Under 20% on top of torch, each in a process of its own; the least of five pairs."""
    code = """
import time
a = time.perf_counter()
import torch
b = time.perf_counter()
import dynarank
print((time.perf_counter() - b) / (b - a))
"""
    _python(code)  # fill the bytecode caches
    ratios = [float(_python(code)) for _ in range(5)]
    assert min(ratios) < 0.2, ratios
