"""The file of an experiment that cannot be used is left out by name, and stops no other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import verify
from benchmarks.training.__main__ import main
from benchmarks.training.harness import evidence, experiment

TWICE = """
from benchmarks.training.experiments.mlp_table import _problem
from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment

EXPERIMENT = Experiment("mine", _problem, [*arms.full_rank(), *arms.full_rank()])
"""
BROKEN = {
    TWICE: "ValueError: two arms are named 'full rank'",
    TWICE.replace("full_rank()", "decays(0.5)", 1).replace("full_rank()", "decays(0.4)", 1): (
        "ValueError: no arm is named 'full rank'"
    ),
    "EXPERIMENT = (": "SyntaxError: '(' was never closed",
    "import no_such_package": "ModuleNotFoundError: No module named 'no_such_package'",
    "": "AttributeError",
}


@pytest.fixture(params=list(BROKEN))
def why(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """What is said of a broken file beside the experiments."""
    (tmp_path / "zz_bad.py").write_text(request.param)
    folder = experiment.folder
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    experiment.names.cache_clear()
    yield f"benchmarks/training/experiments/zz_bad.py: {BROKEN[request.param]}"
    monkeypatch.undo()
    experiment.names.cache_clear()
    sys.modules.pop("benchmarks.training.experiments.zz_bad", None)


def ended(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["training", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_the_others_are_done(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ("--results", str(tmp_path))
    assert ended(monkeypatch, "status", "zz_bad", "mlp_table", *results) == 1
    out, err = capsys.readouterr()
    assert "mlp_table" in out and "zz_bad" not in out
    assert err.startswith(f"zz_bad is left out: {why}") and err.count("\n") == 1
    assert ended(monkeypatch, "run", "zz_bad", *results) == 1
    assert ended(monkeypatch, "status", "mlp_table", *results) == 0


def test_nothing_is_written_and_nothing_verified(
    why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "write", lambda: pytest.fail("it writes"))
    assert ended(monkeypatch, "write") == "nothing is written"
    assert why in capsys.readouterr().err
    assert verify.main([]) == 1
    assert capsys.readouterr().out.startswith(why)
