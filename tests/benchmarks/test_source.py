"""What an own problem or arm is made of is in its records, and nothing else of its file."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from tiny_experiment import Tiny

from benchmarks.training.harness.source import source
from benchmarks.training.problems.tabular import Table
from dynarank.schedules import decay

HELPERS = "SHARE = 0.5\n\n\ndef half(x):\n    return SHARE * x\n\n\ndef unused():\n    return 1\n"
MINE = '''
from own_helpers import half
from tiny_experiment import Tiny

RATES = [1.0, 2.0]
steps = 7


class Base(Tiny):
    def factor(self, step):
        return RATES[0]


class Mine(Base):
    """A problem."""

    def score(self, outputs, targets):
        steps = 5
        return {"accuracy": half(steps)}


def adam(problem, model, rate):
    return problem.optimizer(model, decoupled(rate))


def decoupled(rate):
    return rate


ARMS = [Mine for steps in range(3)]
'''


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the two files and import the first one again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def written(mine: str = MINE, helpers: str = HELPERS) -> ModuleType:
        for name, text in (("own_helpers", helpers), ("own_mine", mine)):
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module("own_mine")

    return written


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("steps = 5", "steps = 6"),
        ("RATES[0]", "RATES[1]"),
        ("RATES = [1.0, 2.0]", "RATES = [1.5, 2.0]"),
        ("class Mine(Base):", "class Mine(Tiny):"),
        (
            "    def score",
            "    def optimizer(self, model, rate):\n        return 1\n\n    def score",
        ),
        ("SHARE = 0.5", "SHARE = 0.6"),
        ("return SHARE * x", "return SHARE + x"),
    ],
)
def test_every_edit_of_what_a_problem_uses_is_seen(write, before: str, after: str) -> None:
    one = source(write().Mine())
    mine, helpers = MINE.replace(before, after), HELPERS.replace(before, after)
    assert (mine, helpers) != (MINE, HELPERS)
    assert source(write(mine, helpers).Mine()) != one


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"""A problem."""', '"""My problem."""'),
        ("steps = 5", "steps = 5  # of seven"),
        ('{"accuracy": half(steps)}', "{\n            'accuracy': half(steps),\n        }"),
        ("steps = 7", "steps = 8"),
        ("range(3)", "range(4)"),
        ("import half", "import half, unused"),
        ("return rate", "return 2 * rate"),
        ("return 1\n", "return 2\n"),
    ],
)
def test_no_other_edit_of_its_file_is(write, before: str, after: str) -> None:
    one = source(write().Mine())
    mine, helpers = MINE.replace(before, after), HELPERS.replace(before, after)
    assert (mine, helpers) != (MINE, HELPERS)
    assert source(write(mine, helpers).Mine()) == one


def test_functions_are_seen_with_what_they_call(write) -> None:
    mine = write()
    one = source(mine.adam)
    assert one == source(partial(mine.adam, rate=1.0)) != source(mine.decoupled)
    assert source(write(MINE.replace("return rate", "return 2 * rate")).adam) != one


def test_what_a_problem_holds_is_seen(write) -> None:
    tiny, mine = Tiny(), write()
    tiny.loss = mine.decoupled  # pyright: ignore
    tiny.other = mine.Base()  # pyright: ignore
    one = source(tiny)
    assert one != source(Tiny())
    for before, after in (("return rate", "return 2 * rate"), ("RATES[0]", "RATES[1]")):
        mine = write(MINE.replace(before, after))
        tiny.loss, tiny.other = mine.decoupled, mine.Base()  # pyright: ignore
        assert source(tiny) != one


def test_what_comes_with_the_library_adds_nothing() -> None:
    assert source(Table(), decay, None, partial(int, base=2)) is None
