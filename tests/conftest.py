"""Laws run over a covering set of their products, or over all of them with ``--all-laws``."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import only_new_objects as heap
import pytest
from covering import selected
from process_pool import Pool, Pools


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-laws", action="store_true", help="run laws over their whole products")
    parser.addoption("--sequences", type=int, default=12, help="how many sequences of events")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for mark in metafunc.definition.iter_markers("product"):
        everything = metafunc.config.getoption("--all-laws")
        names, rows = selected(*mark.args, everything=everything)
        metafunc.parametrize(names, rows, ids=["-".join(map(_id, row)) for row in rows])


def pytest_collection_finish() -> None:
    heap.freeze()


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """Of what earlier modules have left, compiled graphs above all, a collection takes a second."""
    heap.freeze()


@pytest.fixture(scope="session", autouse=True)
def only_new_objects() -> Iterator[None]:
    """Changes do not search among frozen objects, which would take most of the time.

    They are what was loaded before the tests of a module: nothing of them is looked for.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "get_freeze_count", int)
        yield


@pytest.fixture
def frozen_objects_too() -> Iterator[None]:
    """A change looks among frozen objects, as it does outside of tests."""
    with heap.frozen_objects_too():
        yield


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write a stand-in for the page, which takes longer than small runs."""

    def write(folder: Path) -> Path:
        (folder / "report.html").write_text("page")
        return folder / "report.html"

    monkeypatch.setattr("dynarank.cli.job_runner.write_report", write)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one state a process, of whichever precision was asked for first."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
    """Tests in several processes share long-lived ones: starting them costs more than a test."""
    made: dict[int, Pool] = {}
    yield made
    for pool in made.values():
        pool.close()


@pytest.fixture
def processes(pools: dict[int, Pool]) -> Pools:
    """``processes(2)(function, *args)``: the function's result in each of two gloo processes.

    The function is one of a module's (not nested), as it is imported in the processes.
    """

    def of(size: int) -> Pool:
        if size not in pools or not pools[size].usable:
            pools[size] = Pool(size)
        return pools[size]

    return of


def _id(value: object) -> str:
    return getattr(value, "__name__", str(value))
