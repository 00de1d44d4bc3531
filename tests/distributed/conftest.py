"""Tests in several processes share long-lived ones: starting them costs more than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from process_pool import Pool, Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
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
