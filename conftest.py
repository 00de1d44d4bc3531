"""Every test draws its own numbers, and every docstring's example has torch, nn and dr at hand."""

from __future__ import annotations

import zlib
from collections.abc import Generator

import pytest
import torch
from hypothesis import HealthCheck, settings

import dynarank as dr

settings.register_profile(
    "explore",
    deadline=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("repeat", settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeat")


@pytest.fixture(autouse=True)
def names_in_examples(doctest_namespace: dict[str, object]) -> None:
    """Give the examples the names a user would have imported."""
    doctest_namespace.update(torch=torch, nn=torch.nn, dr=dr)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch by the test's name: what fails, fails again, on its own and in any order."""
    torch.manual_seed(_seed(item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    """Seed torch by the name of a fixture that tests share, whichever of them comes first."""
    if fixturedef.scope == "function":
        return (yield)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(_seed(f"{fixturedef.baseid}::{fixturedef.argname}"))
        return (yield)


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())
