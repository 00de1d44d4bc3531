"""Law 5 is checked after every change, under ``python -O`` too, and a fault undoes the change."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import dynarank as dr
from dynarank.surgery import edit, transaction
from dynarank.surgery.optimizer_state import Contents

# ``python -O`` itself would compile all of torch once more.
SCRIPT = """
import sys, torch, torch._dynamo
from importlib.machinery import SourceFileLoader
compiled = SourceFileLoader.source_to_code
SourceFileLoader.source_to_code = lambda self, data, path: compiled(self, data, path, _optimize=1)
sys.pycache_prefix = sys.argv[1]
import asserts_what_is_wrong
import dynarank as dr
from dynarank.surgery import edit, transaction

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
held, weights = list(optimizer.param_groups[0]["params"]), [model[0].weight, model[1].weight]
transaction.write = lambda contents, undo: None  # the optimizer keeps the old parameters
try:
    dr.factorize(model, 2, layers="*", optimizer=optimizer)
except RuntimeError as error:
    print(error)
print([type(m).__name__ for m in model], model[0].weight is weights[0])
"""


def test_it_is_checked_under_python_o(tmp_path: Path) -> None:
    source = str(Path(dr.__file__).parents[1])
    (tmp_path / "asserts_what_is_wrong.py").write_text("assert False")
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "compiled")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((source, str(tmp_path)))},
        capture_output=True,
        text=True,
        check=True,
    )
    error, state = ran.stdout.strip().splitlines()
    assert error.startswith(
        "layer '0', FullRank() -> LowRank(rank=2, decomposition='svd'): down is"
    )
    assert state == "['Linear', 'Linear'] True"


def adapted() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    return model, optimizer


def _held(contents: Contents) -> list[nn.Parameter]:
    return next(new for table, new in contents if isinstance(table, list))


def _twice(contents: Contents) -> None:
    _held(contents).append(_held(contents)[0])


def _old(contents: Contents, old: nn.Parameter) -> None:
    _held(contents).append(old)


def _state(contents: Contents, value: Tensor) -> None:
    states = next(new for table, new in contents if isinstance(table, defaultdict))
    *_, state = states.values()
    state["max_exp_avg_sq"] = value


FAULTS = {
    r"down is in 2 groups": lambda contents, old: _twice(contents),
    r"still has its old parameters": _old,
    r"max_exp_avg_sq of up has shape \(3,\), not \(8, 2\)": lambda contents, old: _state(
        contents, torch.zeros(3)
    ),
    r"max_exp_avg_sq of up is not finite": lambda contents, old: _state(
        contents, torch.full((8, 2), torch.nan)
    ),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_fault_is_named_and_the_change_undone(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = adapted()
    weights = [m.weight for m in model]
    held, states = list(optimizer.param_groups[0]["params"]), list(optimizer.state)
    original = transaction.new_contents

    def faulty(edits, optimizers, moments):  # type: ignore[no-untyped-def]
        contents = original(edits, optimizers, moments)
        FAULTS[words](contents, weights[0])
        return contents

    monkeypatch.setattr(transaction, "new_contents", faulty)
    with pytest.raises(RuntimeError, match=words + ".*as they were before"):
        dr.factorize(model, 2, layers="*", optimizer=optimizer)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert [m.weight is w for m, w in zip(model, weights, strict=True)] == [True, True]
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"], strict=True))
    assert all(a is b for a, b in zip(states, optimizer.state, strict=True))


def test_to_plain_needs_full_rank() -> None:
    layer = dr.factorize(nn.Linear(8, 8), 2)
    with pytest.raises(ValueError, match=r"dr\.merge"):
        layer.to_plain()
    assert dr.current_plan(layer) == {"": dr.LowRank(2)}


@pytest.mark.slow
def test_verification_costs_under_5_percent_of_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the processor time of all four changes, AdamW's state moved too."""
    spent: list[float] = []

    def timed(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def call(*args: object) -> object:
            start = time.process_time()
            try:
                return original(*args)
            finally:
                spent.append(time.process_time() - start)

        monkeypatch.setattr(module, name, call)

    timed(edit, "_check_values")
    timed(edit, "_measured")
    timed(transaction, "check_committed")
    shares: list[float] = []
    for _ in range(4):
        model = nn.Sequential(nn.Linear(640, 640), nn.Linear(640, 640))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(4, 640)).sum().backward()
        optimizer.step()
        spent.clear()
        start = time.process_time()
        dr.factorize(model, 160, layers="*", optimizer=optimizer)
        dr.inflate(model, optimizer=optimizer)
        dr.deflate(model, 160, optimizer=optimizer)
        dr.merge(model, optimizer=optimizer)
        shares.append(sum(spent) / (time.process_time() - start))
    assert len(spent) == 3 * 8 - 4 and median(shares[1:]) < 0.05
