"""Every example runs, is short, and says at the top what it shows."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_encoder import write_tiny_encoder
from warm_python import IMPORTED, run

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
    "08_own_loop_recorded": ["--epochs", "2"],
    "09_compress_an_encoder": "--encoder encoder --data pairs --shares 0.5 --rounds 1".split(),
    "10_your_own_recipe": ["--epochs", "1", "--train-limit", "64"],
    "11_several_processes": ["--steps", "120", "--kill-at", "70"],
    "12_transformers_trainer": ["--steps", "24"],
    "13_lightning": ["--steps", "40"],
    "14_accelerate": ["--epochs", "3"],
    "15_averages": ["--steps", "60"],
    "16_deploy": ["--steps", "20"],
    "17_peft": ["--steps", "20"],
}
TORCHRUN = "-m torch.distributed.run --nproc-per-node 2 --max-restarts 1"
TORCHRUN += " --rdzv-backend c10d --rdzv-endpoint localhost:0"
STARTED_BY = {"11_several_processes": TORCHRUN.split()}  # the others by Python alone
SAYS = {
    "01_functions": 'deflate(to="adapted")     23,306 trainable, output change 0.0e+00',
    "02_plain_loop": "layer 3: FullRank() -> LowRank(rank=13, decomposition='svd')",
    "03_custom_schedule": "layer 2: LowRank(rank=25, decomposition='svd')",
    "04_automatic_schedules": "layer 0: effective rank saturates the low rank (effective_rank",
    "05_custom_decomposition": "True Sequential",
    "06_custom_layer": "True Sequential",
    "07_save_and_resume": "bit by bit the same weights: True",
    "08_own_loop_recorded": "report: runs/digits-loop/report.html",
    "09_compress_an_encoder": "0.5 calibrated, in a budget",
    "10_your_own_recipe": "test worst_class",
    "11_several_processes": "process 1 of 2 goes on at step 50",
    "12_transformers_trainer": "24 losses as in the plain loop; resumed from 3 checkpoints",
    "13_lightning": "resumed after step 30: the same losses",
    "14_accelerate": "the other 14 are the same",
    "15_averages": "the resumed average is bit by bit the same: True",
    "16_deploy": "parameters: trained 57,354, plain 57,354, merged 301,066",
    "17_peft": "brought back, it computes the same: True",
}
LINES = {"05_custom_decomposition": 39, "06_custom_layer": 39}  # at most; the others 150


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    if path.stem == "09_compress_an_encoder":
        write_tiny_encoder(tmp_path)
    words = ["-W", "error", *STARTED_BY.get(path.stem, []), path, *ARGUMENTS[path.stem]]
    done = run(words, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout


def test_what_is_imported_before_they_run_gives_no_warning() -> None:
    words = ["-W", "error", "-c", f"import {', '.join(IMPORTED)}"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short_and_explains_itself(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LINES.get(path.stem, 150)
    assert ast.get_docstring(ast.parse(text))
