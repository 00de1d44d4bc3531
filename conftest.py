"""Every test draws its own numbers, and every docstring's example has torch, nn and dr at hand."""

from __future__ import annotations

import zlib

import pytest
import torch

import dynarank as dr


@pytest.fixture(autouse=True)
def names_in_examples(doctest_namespace: dict[str, object]) -> None:
    """Give the examples the names a user would have imported."""
    doctest_namespace.update(torch=torch, nn=torch.nn, dr=dr)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch by the test's name: what fails, fails again, on its own and in any order."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))
