"""Every example runs, is short, and says at the top what it shows."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_encoder import write_tiny_encoder

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ARGUMENTS = {
    "01_functions": ["--steps", "5"],
    "02_plain_loop": ["--epochs", "2"],
    "03_custom_schedule": ["--steps", "10"],
    "04_automatic_schedules": ["--steps", "100"],
    "05_custom_decomposition": [],
    "06_custom_layer": [],
    "07_save_and_resume": ["--steps", "20"],
    "09_compress_an_encoder": "--encoder encoder --data pairs --shares 0.5 --rounds 1".split(),
}
SAYS = {
    "01_functions": 'deflate(to="adapted")     23,306 trainable, output change 0.0e+00',
    "02_plain_loop": "layer 3: FullRank() -> LowRank(rank=13, decomposition='svd')",
    "03_custom_schedule": "layer 2: LowRank(rank=25, decomposition='svd')",
    "04_automatic_schedules": "layer 0: effective rank saturates the low rank (effective_rank",
    "05_custom_decomposition": "True Sequential",
    "06_custom_layer": "True Sequential",
    "07_save_and_resume": "bit by bit the same weights: True",
    "09_compress_an_encoder": "0.5 calibrated, in a budget",
}
LINES = {"05_custom_decomposition": 39, "06_custom_layer": 39}  # at most; the others 150


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    if path.stem == "09_compress_an_encoder":
        write_tiny_encoder(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", path, *ARGUMENTS[path.stem]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short_and_explains_itself(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LINES.get(path.stem, 150)
    assert ast.get_docstring(ast.parse(text))


def test_the_readme_shows_code_that_runs() -> None:
    """Each Python block of the README, one after another in one namespace."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    assert blocks
    code = "\n".join(block.split("```")[0] for block in blocks)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_documents_name_tests_that_exist() -> None:
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for path in pages:
        if path.parent.name == "how-to":  # these name the files that a reader is to write
            continue
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"test_\w+\.py", text)) <= names, path
        for place in re.findall(r"tests/[\w/]+\.py", text):
            assert (ROOT / place).exists(), f"{path}: {place}"


def test_no_document_holds_a_placeholder_or_a_dead_link() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(documents) >= 6
    # Names that a page may speak of, since a module defines them.
    code = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    constants = set(re.findall(r"^([A-Z_]+)(?:: .*)? = ", code, re.M))
    for path in documents:
        text = path.read_text(encoding="utf-8")
        names = set(re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b|^RESULTS$|TODO", text, re.M))
        assert not names - constants, path
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (path.parent / target).exists(), f"{path}: {target}"
